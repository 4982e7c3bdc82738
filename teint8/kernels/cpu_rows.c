/* INT8 on the CPU: row quantization, the epilogue of a matmul, and, where the CPU has AMX, AVX-512 VNNI or AVX2, the matmul with its epilogue.
 *
 * Compile with -ffp-contract=off: a contracted multiply-add rounds once where the contract rounds twice.
 * The low byte of (v + 1.5 * 2^23) is rint(v), ties to even, for |v| <= 127: cheaper than a conversion. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef _Float16 f16;
static inline uint32_t bits_of(float v) { uint32_t b; memcpy(&b, &v, 4); return b; }
static inline float float_of(uint32_t b) { float v; memcpy(&v, &b, 4); return v; }

static inline float load_f32(float v) { return v; }
static inline float load_bf16(bf16 v) { return float_of((uint32_t)v << 16); }
static inline float load_f16(f16 v) { return (float)v; }

static inline float store_f32(float v) { return v; }
static inline f16 store_f16(float v) { return (f16)v; }
static inline bf16 store_bf16(float v)
{
    uint32_t b = bits_of(v);
    uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1)) >> 16;
    return (bf16)((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline uint32_t mix32(uint32_t h)
{
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    return h ^ (h >> 16);
}

static inline uint32_t mixed_seed(int64_t seed)
{
    return mix32(mix32((uint32_t)seed) ^ (uint32_t)((uint64_t)seed >> 32));
}

/* Odd keys of rows, or of columns with the seed ^ 1; their product is the noise (numerics.noise). */
static inline uint32_t noise_key(uint32_t mixed, uint32_t index)
{
    uint32_t h = (mixed + index) * 0x9e3779b1u;
    return (h ^ (h >> 15)) | 1u;
}

static inline float clamp(float v) { return v < -127.f ? -127.f : v > 127.f ? 127.f : v; }

#define QUANTIZE(T)                                                                                                                 \
    /* One row of k values: codes, and zeros up to ldq; seed and given scale as the caller has them, or NULL. Returns the scale. */ \
    static inline float quantize_row_##T(const T *row, int8_t *out, int64_t k, int64_t ldq, const int64_t *seed, uint32_t index,    \
                                         const float *given)                                                                        \
    {                                                                                                                               \
        uint32_t top = 0; /* absmax by its bits: a NaN is above infinity, which is above every number */                            \
        for (int64_t j = 0; j < k; j++) {                                                                                           \
            uint32_t b = bits_of(load_##T(row[j])) & 0x7fffffffu;                                                                   \
            top = b > top ? b : top;                                                                                                \
        }                                                                                                                           \
        float absmax = float_of(top), multiplier = 0.f, scale = 0.f;                                                                \
        if (top >= 0x7f800000u) scale = given && *given == 0.f ? 0.f : NAN;                                                         \
        else if (given) { scale = *given >= 0.f ? *given : NAN; multiplier = scale > 0.f ? 1.f / scale : 0.f; }                     \
        else if (absmax >= 0x1p-100f) { scale = absmax / 127.f; multiplier = 127.f / absmax; }                                      \
        memset(out + k, 0, ldq - k);                                                                                                \
        if (multiplier == 0.f) memset(out, 0, k);                                                                                   \
        else if (given)                                                                                                             \
            for (int64_t j = 0; j < k; j++) out[j] = (int8_t)bits_of(clamp(load_##T(row[j]) * multiplier) + 12582912.f);            \
        else if (seed) {                                                                                                            \
            uint32_t key = noise_key(mixed_seed(*seed), index), columns = mixed_seed(*seed ^ 1);                                    \
            multiplier *= 1.f - 0x1p-22f;                                                                                           \
            for (int64_t j = 0; j < k; j++) {                                                                                       \
                float noise = float_of(0x3f800000u | (key * noise_key(columns, (uint32_t)j)) >> 9);                                 \
                out[j] = (int8_t)((int32_t)floorf(load_##T(row[j]) * multiplier + noise) - 1);                                      \
            }                                                                                                                       \
        } else /* |x * 127 / absmax| rounds to 127 at most: no clamp */                                                               \
            for (int64_t j = 0; j < k; j++) out[j] = (int8_t)bits_of(load_##T(row[j]) * multiplier + 12582912.f);                   \
        return scale;                                                                                                               \
    }                                                                                                                               \
    void quantize_##T(const T *x, int64_t ldx, int8_t *codes, float *scales, int64_t m, int64_t k, const int64_t *seeds,            \
                      int64_t rows_per_seed, const float *given, int threads)                                                       \
    {                                                                                                                               \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                           \
        for (int64_t i = 0; i < m; i++)                                                                                             \
            scales[i] = quantize_row_##T(x + i * ldx, codes + i * k, k, k, seeds ? seeds + i / rows_per_seed : 0,                   \
                                         (uint32_t)(i % rows_per_seed), given ? given + i : 0);                                     \
    }

#define EPILOGUE(T)                                                                                                        \
    static inline void row_##T(const int32_t *sums, const float *w_scale, float s, const float *bias, T *y, int64_t n)     \
    {                                                                                                                      \
        if (bias)                                                                                                          \
            for (int64_t j = 0; j < n; j++) y[j] = store_##T((float)sums[j] * w_scale[j] * s + bias[j]);                   \
        else                                                                                                               \
            for (int64_t j = 0; j < n; j++) y[j] = store_##T((float)sums[j] * w_scale[j] * s);                             \
    }                                                                                                                      \
    void epilogue_##T(const int32_t *sums, const float *x_scale, const float *w_scale, const float *bias, T *y, int64_t m, \
                      int64_t n, int threads)                                                                              \
    {                                                                                                                      \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
        for (int64_t i = 0; i < m; i++) row_##T(sums + i * n, w_scale, x_scale[i], bias, y + i * n, n);                    \
    }

typedef float f32;
QUANTIZE(f32)
QUANTIZE(bf16)
QUANTIZE(f16)
EPILOGUE(f32)
EPILOGUE(bf16)
EPILOGUE(f16)

#include "cpu_conv.h"

#ifdef __AVX2__
#include <immintrin.h>
#include <omp.h>
#endif

#ifdef __AVX512BW__
/* 32 channels of w (n, k), from channel c, as two panels of 16: 64 bytes hold four consecutive k of each channel, as tiles and
 * VNNI want them; zeros past the edges. Transposed anew in each call: a second copy of the weights would cost more than it saves. */
static inline void pack(const int8_t *w, int64_t c, int64_t n, int64_t k, int8_t *panels, int8_t *stage, int64_t kp)
{
    /* weights come from memory: they are read in order, as the hardware's prefetcher likes it, and transposed in the cache */
    memcpy(stage, w + c * k, (n - c < 32 ? n - c : 32) * k);
    for (int p = 0; p < 2; p++) {
        int64_t first = c + p * 16;
        for (int64_t j = 0; j < kp; j += 64) {
            __m512i r[16], t[16];
            __mmask64 mask = k - j >= 64 ? ~0ull : (1ull << (k - j)) - 1;
            for (int i = 0; i < 16; i++)
                r[i] = first + i < n ? _mm512_maskz_loadu_epi8(mask, stage + (p * 16 + i) * k + j) : _mm512_setzero_si512();
            /* a 16 x 16 transpose of 4-byte words in four rounds */
            for (int i = 0; i < 16; i += 2) {
                t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
                t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
            }
            for (int i = 0; i < 16; i += 4) {
                r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
                r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
                r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
                r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
            }
            for (int i = 0; i < 4; i++)
                for (int h = 0; h < 16; h += 8) {
                    t[i + h] = _mm512_shuffle_i32x4(r[i + h], r[i + h + 4], 0x88);
                    t[i + h + 4] = _mm512_shuffle_i32x4(r[i + h], r[i + h + 4], 0xdd);
                }
            int8_t *out = panels + (p * kp + j) * 16;
            for (int i = 0; i < 8; i++) {
                _mm512_store_si512(out + i % 4 * 64 + i / 4 * 256, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
                _mm512_store_si512(out + i % 4 * 64 + i / 4 * 256 + 512, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
            }
        }
    }
}
#endif

/* How the channels, in pairs of panels, and the rows, in blocks, are cut into jobs: groups of pairs, which a thread packs
 * before it multiplies, and parts of the rows. To pack a pair takes about as long as to multiply it by a block of rows. */
struct cut { int64_t groups, parts; };

static struct cut cut_of(int64_t pairs, int64_t blocks, int64_t least, int64_t threads)
{
    struct cut best = {pairs, 1};
    int64_t lowest = INT64_MAX;
    for (int64_t parts = 1; parts <= threads && parts <= blocks; parts++)
        for (int64_t rounds = 1; rounds <= 4; rounds++) {
            int64_t groups = rounds * threads / parts;
            groups = groups < least ? least : groups > pairs ? pairs : groups;
            int64_t turns = (groups * parts + threads - 1) / threads;
            int64_t cost = turns * ((pairs + groups - 1) / groups) * ((blocks + parts - 1) / parts + 1);
            if (cost < lowest) {
                lowest = cost;
                best = (struct cut){groups, parts};
            }
        }
    return best;
}

/* A weight (n, k) and what becomes of it: codes, scales, bias or NULL, y (m, n); a thread packs `held` pairs of its panels at once. */
struct weight { const int8_t *w; const float *scale, *bias; void *y; int64_t n, held; };

/* For each weight y from x (m, k), or where x is NULL from codes of it (row stride ldx) and their scales. Else scales (m) are written.
 * codes (m rounded up to a block's rows, kp) is scratch, and so is each thread's: 32 * kp bytes, and the most PANEL(kp) * held.
 *
 * Rows of codes are put in the order that the instructions want, 16 at a time or fewer. A job's panels are packed first and stay in the L2 cache,
 * with the codes of some rows: all of them are multiplied by those before the next rows, so that neighbouring parts of a row of y are
 * written one after the other. */
#define BAND 16
#define PANEL(KP) (32 * (KP) + 128)
#define LINEAR(ISA, ROWS, T)                                                                                                    \
    static void ISA##_jobs_##T(const struct weight *to, const int8_t *codes, const float *scales, int8_t *stage, int64_t m,     \
                               int64_t k, int64_t kp, int threads)                                                              \
    {                                                                                                                           \
        const int64_t n = to->n, pairs = (n + 31) / 32, blocks = (m + ROWS - 1) / ROWS;                                         \
        const int64_t fit = (1 << 18) / (kp * ROWS), most = 128 / ROWS;                                                         \
        const int64_t step = fit < 1 ? 1 : fit < most ? fit : most; /* blocks whose codes are read again and again */           \
        const struct cut cut = cut_of(pairs, blocks, blocks <= step ? pairs : (pairs + to->held - 1) / to->held, threads);      \
        int8_t *panels = stage + 32 * kp;                                                                                       \
        int32_t sums[ROWS * 32] __attribute__((aligned(64)));                                                                   \
        int64_t packed = -1;                                                                                                    \
        _Pragma("omp for schedule(static) nowait")                                                                              \
        for (int64_t job = 0; job < cut.groups * cut.parts; job++) {                                                            \
            const int64_t group = job / cut.parts, part = job % cut.parts;                                                      \
            const int64_t first = group * pairs / cut.groups, last = (group + 1) * pairs / cut.groups;                          \
            const int64_t end = (part + 1) * blocks / cut.parts;                                                                \
            for (int64_t p = first; p < last && packed != group; p++)                                                           \
                ISA##_pack(to->w, p * 32, n, k, panels + (p - first) * PANEL(kp), stage, kp);                                   \
            packed = group;                                                                                                     \
            for (int64_t from = part * blocks / cut.parts; from < end; from += step)                                            \
                for (int64_t p = first; p < last; p++)                                                                          \
                    for (int64_t b = from; b < from + step && b < end; b++) {                                                   \
                        const int64_t c = p * 32, wide = n - c < 32 ? n - c : 32, i = b * ROWS;                                 \
                        const float *bias = to->bias ? to->bias + c : 0;                                                        \
                        ISA##_block(codes + i * kp, panels + (p - first) * PANEL(kp), kp, sums);                                \
                        for (int64_t r = i; r < i + ROWS && r < m; r++) {                                                       \
                            T *out = (T *)to->y + r * n + c;                                                                    \
                            if (wide == 32) row_##T(sums + (r - i) * 32, to->scale + c, scales[r], bias, out, 32);              \
                            else row_##T(sums + (r - i) * 32, to->scale + c, scales[r], bias, out, wide);                       \
                        }                                                                                                       \
                    }                                                                                                           \
        }                                                                                                                       \
    }                                                                                                                           \
    void ISA##_linear_##T(const T *x, const int8_t *given, int64_t ldx, int8_t *codes, float *scales,                           \
                          const struct weight *weights, int64_t count, int8_t *scratch, int64_t m, int64_t k, int64_t kp,       \
                          int threads)                                                                                          \
    {                                                                                                                           \
        int64_t held = 0, band = BAND;                                                                                          \
        while (band > 1 && m < band * threads) band /= 2; /* some for each thread */                                            \
        for (int64_t i = 0; i < count; i++) held = weights[i].held > held ? weights[i].held : held;                             \
        _Pragma("omp parallel num_threads(threads)")                                                                            \
        {                                                                                                                       \
            int8_t *stage = scratch + omp_get_thread_num() * (32 * kp + held * PANEL(kp));                                      \
            _Pragma("omp for schedule(static)")                                                                                 \
            for (int64_t i = 0; i < m; i += band) {                                                                             \
                const int64_t rows = m - i < band ? m - i : band;                                                               \
                const int whole = !x && k == kp; /* nothing to fill up: they are taken from where they lie */                   \
                for (int64_t r = 0; r < rows && !whole; r++)                                                                    \
                    if (x) scales[i + r] = quantize_row_##T(x + (i + r) * ldx, stage + r * kp, k, kp, 0, 0, 0);                 \
                    else {                                                                                                      \
                        memcpy(stage + r * kp, given + (i + r) * ldx, k);                                                       \
                        memset(stage + r * kp + k, 0, kp - k);                                                                  \
                    }                                                                                                           \
                ISA##_place(whole ? given + i * ldx : stage, whole ? ldx : kp, rows, codes, i, kp);                             \
            }                                                                                                                   \
            ISA##_begin();                                                                                                      \
            for (int64_t i = 0; i < count; i++) ISA##_jobs_##T(weights + i, codes, scales, stage, m, k, kp, threads);           \
            ISA##_end();                                                                                                        \
        }                                                                                                                       \
    }

#if defined(__AVX2__) && !defined(__AVX512F__)
#include "cpu_avx2.h"
#endif

#ifdef __AVX512VNNI__
/* dpbusd multiplies unsigned by signed bytes: codes of x are stored as code + 128, and each channel's sum starts at -128 times the sum
 * of its weights, which is kept behind the panels. */
static inline void vnni_place(const int8_t *rows, int64_t ldr, int64_t count, int8_t *codes, int64_t first, int64_t kp)
{
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < kp; j++) codes[(first + i) * kp + j] = rows[i * ldr + j] ^ (int8_t)0x80;
}

static inline void vnni_begin(void) {}
static inline void vnni_end(void) {}
static inline void vnni_pack(const int8_t *w, int64_t c, int64_t n, int64_t k, int8_t *panels, int8_t *stage, int64_t kp)
{
    pack(w, c, n, k, panels, stage, kp);
    for (int p = 0; p < 2; p++) {
        __m512i start = _mm512_setzero_si512();
        for (int64_t j = 0; j < kp; j += 4)
            start = _mm512_dpbusd_epi32(start, _mm512_set1_epi8((char)0x80), _mm512_load_si512(panels + (p * kp + j) * 16));
        _mm512_store_si512(panels + 32 * kp + p * 64, _mm512_sub_epi32(_mm512_setzero_si512(), start));
    }
}

/* 12 rows of codes (row stride kp) by 32 channels (two panels): 24 registers of sums. */
#define VNNI_ROWS 12
static inline void vnni_block(const int8_t *a, const int8_t *b, int64_t kp, int32_t *sums)
{
    __m512i s[VNNI_ROWS][2];
    for (int r = 0; r < VNNI_ROWS; r++)
        for (int p = 0; p < 2; p++) s[r][p] = _mm512_load_si512(b + 32 * kp + p * 64);
    for (int64_t j = 0; j < kp; j += 4) {
        const __m512i w0 = _mm512_load_si512(b + j * 16), w1 = _mm512_load_si512(b + (kp + j) * 16);
        for (int r = 0; r < VNNI_ROWS; r++) {
            int32_t four;
            memcpy(&four, a + r * kp + j, 4);
            const __m512i x = _mm512_set1_epi32(four);
            s[r][0] = _mm512_dpbusd_epi32(s[r][0], x, w0);
            s[r][1] = _mm512_dpbusd_epi32(s[r][1], x, w1);
        }
    }
    for (int r = 0; r < VNNI_ROWS; r++)
        for (int p = 0; p < 2; p++) _mm512_store_si512(sums + r * 32 + p * 16, s[r][p]);
}
LINEAR(vnni, VNNI_ROWS, f32)
LINEAR(vnni, VNNI_ROWS, bf16)
LINEAR(vnni, VNNI_ROWS, f16)
#endif

#if defined(__AMX_INT8__) && defined(__AVX512BW__)
#include <sys/syscall.h>
#include <unistd.h>

int amx_enable(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

/* Tile by tile: 16 rows of 64 codes are 1024 bytes, so that a tile is read in order and its rows never share a set of the cache. */
static inline void amx_place(const int8_t *rows, int64_t ldr, int64_t count, int8_t *codes, int64_t first, int64_t kp)
{
    int8_t *tiles = codes + first / BAND * BAND * kp + first % BAND * 64;
    for (int64_t j = 0; j < kp; j += 64)
        for (int64_t i = 0; i < count; i++) memcpy(tiles + j * BAND + i * 64, rows + i * ldr + j, 64);
}

struct tiles { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; };

static inline void amx_begin(void)
{
    struct tiles config = {.palette = 1};
    for (int i = 0; i < 8; i++) { config.bytes[i] = 64; config.rows[i] = 16; }
    _tile_loadconfig(&config);
}

static inline void amx_end(void) { _tile_release(); }
#define amx_pack pack

/* Four tiles of sums: 32 rows of codes, in tiles, by 32 channels (two panels). */
static inline void amx_block(const int8_t *a, const int8_t *b, int64_t kp, int32_t *sums)
{
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t j = 0; j < kp; j += 64) {
        _tile_loadd(4, a + j * 16, 64);
        _tile_loadd(6, b + j * 16, 64);
        _tile_loadd(5, a + (kp + j) * 16, 64);
        _tile_loadd(7, b + (kp + j) * 16, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
}

LINEAR(amx, 32, f32)
LINEAR(amx, 32, bf16)
LINEAR(amx, 32, f16)
#endif

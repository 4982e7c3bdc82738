/* Row quantization and the epilogue of an INT8 matmul on the CPU: the numerics contract, one pass over cached rows.
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

static inline float clamp(float v) { return v < -127.f ? -127.f : v > 127.f ? 127.f : v; }

#define QUANTIZE(T)                                                                                                       \
    void quantize_##T(const T *x, int64_t ldx, int8_t *codes, float *scales, int64_t m, int64_t k, const int64_t *seeds,   \
                      int64_t rows_per_seed, const float *given, int threads)                                              \
    {                                                                                                                      \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
        for (int64_t i = 0; i < m; i++) {                                                                                  \
            const T *row = x + i * ldx;                                                                                    \
            int8_t *out = codes + i * k;                                                                                   \
            uint32_t top = 0; /* absmax by its bits: a NaN is above infinity, which is above every number */               \
            for (int64_t j = 0; j < k; j++) {                                                                              \
                uint32_t b = bits_of(load_##T(row[j])) & 0x7fffffffu;                                                      \
                top = b > top ? b : top;                                                                                   \
            }                                                                                                              \
            float absmax = float_of(top), multiplier = 0.f, scale = 0.f;                                                   \
            if (top >= 0x7f800000u) scale = given && given[i] == 0.f ? 0.f : NAN;                                          \
            else if (given) { scale = given[i] >= 0.f ? given[i] : NAN; multiplier = scale > 0.f ? 1.f / scale : 0.f; }    \
            else if (absmax >= 0x1p-100f) { scale = absmax / 127.f; multiplier = 127.f / absmax; }                         \
            scales[i] = scale;                                                                                             \
            if (multiplier == 0.f) { memset(out, 0, k); continue; }                                                        \
            if (!seeds) {                                                                                                  \
                for (int64_t j = 0; j < k; j++)                                                                            \
                    out[j] = (int8_t)bits_of(clamp(load_##T(row[j]) * multiplier) + 12582912.f);                           \
                continue;                                                                                                  \
            }                                                                                                              \
            uint64_t seed = (uint64_t)seeds[i / rows_per_seed];                                                            \
            uint32_t key = mix32(mix32(mix32((uint32_t)seed) ^ (uint32_t)(seed >> 32)) ^ (uint32_t)(i % rows_per_seed));    \
            for (int64_t j = 0; j < k; j++) {                                                                              \
                float noise = (float)(int32_t)(mix32(key + (uint32_t)j * 0x9e3779b9u) >> 8) * 0x1p-24f;                    \
                out[j] = (int8_t)(int32_t)clamp(floorf(load_##T(row[j]) * multiplier + noise));                            \
            }                                                                                                              \
        }                                                                                                                  \
    }

#define EPILOGUE(T)                                                                                                        \
    void epilogue_##T(const int32_t *sums, const float *x_scale, const float *w_scale, const float *bias, T *y, int64_t m, \
                      int64_t n, int threads)                                                                              \
    {                                                                                                                      \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                  \
        for (int64_t i = 0; i < m; i++) {                                                                                  \
            const int32_t *row = sums + i * n;                                                                             \
            T *out = y + i * n;                                                                                            \
            float s = x_scale[i];                                                                                          \
            if (bias)                                                                                                      \
                for (int64_t j = 0; j < n; j++) out[j] = store_##T((float)row[j] * w_scale[j] * s + bias[j]);              \
            else                                                                                                           \
                for (int64_t j = 0; j < n; j++) out[j] = store_##T((float)row[j] * w_scale[j] * s);                        \
        }                                                                                                                  \
    }

typedef float f32;
QUANTIZE(f32)
QUANTIZE(bf16)
QUANTIZE(f16)
EPILOGUE(f32)
EPILOGUE(bf16)
EPILOGUE(f16)

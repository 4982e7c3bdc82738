/* Convolutions on the CPU, channels last: quantization by channel, depthwise products, and what each window sees as a row of codes.
 * Included by cpu_rows.c. */

#define CHANNELS 64 /* at a time: a line of the cache of codes, and sums that stay in registers */

#define BY_CHANNEL(T)                                                                                                            \
    /* x (batch, pixels, channels) with row stride ldx and batch stride ldb: codes (batch, pixels, channels), scales (batch, channels) */ \
    void channels_##T(const T *x, int64_t ldb, int64_t ldx, int8_t *codes, float *scales, int64_t batch, int64_t pixels,         \
                      int64_t channels, int threads)                                                                             \
    {                                                                                                                            \
        const int64_t blocks = (channels + CHANNELS - 1) / CHANNELS;                                                             \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                        \
        for (int64_t i = 0; i < batch * blocks; i++) {                                                                           \
            const int64_t b = i / blocks, first = i % blocks * CHANNELS;                                                         \
            const int64_t width = channels - first < CHANNELS ? channels - first : CHANNELS;                                     \
            const T *xb = x + b * ldb + first;                                                                                   \
            uint32_t top[CHANNELS] = {0};                                                                                        \
            float multiplier[CHANNELS];                                                                                          \
            for (int64_t p = 0; p < pixels; p++)                                                                                 \
                for (int64_t c = 0; c < width; c++) {                                                                            \
                    uint32_t v = bits_of(load_##T(xb[p * ldx + c])) & 0x7fffffffu;                                               \
                    top[c] = v > top[c] ? v : top[c];                                                                            \
                }                                                                                                                \
            int bad = 0;                                                                                                         \
            for (int64_t c = 0; c < width; c++) {                                                                                \
                float absmax = float_of(top[c]), scale = 0.f;                                                                    \
                multiplier[c] = 0.f;                                                                                             \
                if (top[c] >= 0x7f800000u) { scale = NAN; bad = 1; }                                                             \
                else if (absmax >= 0x1p-100f) { scale = absmax / 127.f; multiplier[c] = 127.f / absmax; }                        \
                scales[b * channels + first + c] = scale;                                                                        \
            }                                                                                                                    \
            int8_t *out = codes + b * pixels * channels + first;                                                                 \
            if (bad) /* NaN and infinity have no code: those channels are 0 by definition */                                     \
                for (int64_t p = 0; p < pixels; p++)                                                                             \
                    for (int64_t c = 0; c < width; c++)                                                                          \
                        out[p * channels + c] = multiplier[c] == 0.f ? 0                                                         \
                            : (int8_t)bits_of(load_##T(xb[p * ldx + c]) * multiplier[c] + 12582912.f);                           \
            else                                                                                                                 \
                for (int64_t p = 0; p < pixels; p++)                                                                             \
                    for (int64_t c = 0; c < width; c++)                                                                          \
                        out[p * channels + c] = (int8_t)bits_of(load_##T(xb[p * ldx + c]) * multiplier[c] + 12582912.f);         \
        }                                                                                                                        \
    }

/* How a window lies in two spatial dimensions. */
typedef struct {
    int64_t batch, height, width, channels, out_height, out_width;
    int64_t kernel_height, kernel_width, stride_height, stride_width, before_height, before_width, dilation_height, dilation_width;
} window;

/* Where row kh of a window begins in the input, or a negative number where it lies outside. */
static inline int64_t line_of(const window *v, int64_t oh, int64_t kh)
{
    int64_t h = oh * v->stride_height - v->before_height + kh * v->dilation_height;
    return h < v->height ? h : -1;
}

static inline int64_t column_of(const window *v, int64_t ow, int64_t kw)
{
    int64_t w = ow * v->stride_width - v->before_width + kw * v->dilation_width;
    return w < v->width ? w : -1;
}

/* Where the pair of taps of a channel of 32 lies: unpacking takes four channels of each 128 bits first, then the other four. */
static inline int place_of(int c) { return c % 8 / 4 * 32 + c / 8 * 8 + c % 4 * 2; }

/* sums[c] of the products of CHANNELS channels or fewer (count), weights in pairs of taps as pair_taps lays them. */
#ifdef __AVX512VNNI__
#include <immintrin.h>
static inline void depthwise_sums(const int8_t *const *at, const int16_t *w, int64_t first, int64_t taps, int64_t count, int32_t *sums)
{
    for (int64_t c = 0; c < count; c += 32, w += (taps + 1) / 2 * 64) {
        const __mmask32 mask = count - c >= 32 ? ~0u : (1u << (count - c)) - 1;
        __m512i low = _mm512_setzero_si512(), high = low;
        for (int64_t t = 0; t < taps; t += 2) {
            __m512i a = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, at[t] + first + c));
            __m512i b = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, at[t + 1 < taps ? t + 1 : t] + first + c));
            /* in each 128 bits the first four channels, or the last four: two taps of a channel side by side */
            low = _mm512_dpwssd_epi32(low, _mm512_unpacklo_epi16(a, b), _mm512_loadu_si512(w + t * 32));
            high = _mm512_dpwssd_epi32(high, _mm512_unpackhi_epi16(a, b), _mm512_loadu_si512(w + t * 32 + 32));
        }
        const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        _mm512_storeu_si512(sums + c, _mm512_permutex2var_epi64(low, front, high));
        _mm512_storeu_si512(sums + c + 16, _mm512_permutex2var_epi64(low, back, high));
    }
}
#else
static inline void depthwise_sums(const int8_t *const *at, const int16_t *w, int64_t first, int64_t taps, int64_t count, int32_t *sums)
{
    memset(sums, 0, CHANNELS * sizeof *sums);
    for (int64_t t = 0; t < taps; t += 2) {
        const int8_t *a = at[t] + first, *b = at[t + 1 < taps ? t + 1 : t] + first;
        for (int64_t c = 0; c < count; c++) {
            const int16_t *u = w + c / 32 * ((taps + 1) / 2) * 64 + t * 32 + place_of(c % 32);
            sums[c] += a[c] * u[0] + b[c] * u[1];
        }
    }
}
#endif

/* Weights (taps, channels) in blocks of 32 channels and pairs of taps; zeros beyond the last tap and channel. */
void taps_i8(const int8_t *w, int16_t *out, int64_t taps, int64_t channels)
{
    const int64_t pairs = (taps + 1) / 2;
    for (int64_t c = 0; c < (channels + 31) / 32 * 32; c++)
        for (int64_t t = 0; t < 2 * pairs; t++)
            out[(c / 32 * pairs + t / 2) * 64 + place_of(c % 32) + t % 2] = t < taps && c < channels ? w[t * channels + c] : 0;
}

#define DEPTHWISE(T)                                                                                                             \
    /* y (batch, out pixels, channels) from codes and weights as taps_i8 lays them: one kernel a channel.  zeros: channels of them. */ \
    void depthwise_##T(const int8_t *x, const float *x_scale, const int16_t *w, const float *w_scale, const float *bias, T *y,   \
                       const window *v, const int8_t *zeros, int threads)                                                        \
    {                                                                                                                            \
        const int64_t taps = v->kernel_height * v->kernel_width, channels = v->channels;                                         \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                                        \
        for (int64_t row = 0; row < v->batch * v->out_height; row++) {                                                           \
            const int64_t b = row / v->out_height, oh = row % v->out_height;                                                     \
            const int8_t *xb = x + b * v->height * v->width * channels, *at[taps];                                               \
            for (int64_t ow = 0; ow < v->out_width; ow++) {                                                                      \
                for (int64_t t = 0; t < taps; t++) {                                                                             \
                    int64_t h = line_of(v, oh, t / v->kernel_width), c = column_of(v, ow, t % v->kernel_width);                  \
                    at[t] = h < 0 || c < 0 ? zeros : xb + (h * v->width + c) * channels;                                         \
                }                                                                                                                \
                T *out = y + (row * v->out_width + ow) * channels;                                                               \
                for (int64_t first = 0; first < channels; first += CHANNELS) {                                                   \
                    int32_t sums[CHANNELS];                                                                                      \
                    const int64_t count = channels - first < CHANNELS ? channels - first : CHANNELS;                             \
                    depthwise_sums(at, w + first / 32 * ((taps + 1) / 2) * 64, first, taps, count, sums);                        \
                    const float *s = x_scale + b * channels + first, *ws = w_scale + first;                                      \
                    if (bias)                                                                                                    \
                        for (int64_t c = 0; c < count; c++) out[first + c] = store_##T((float)sums[c] * ws[c] * s[c] + bias[first + c]); \
                    else                                                                                                         \
                        for (int64_t c = 0; c < count; c++) out[first + c] = store_##T((float)sums[c] * ws[c] * s[c]);           \
                }                                                                                                                \
            }                                                                                                                    \
        }                                                                                                                        \
    }

/* Rows (windows, taps * channels) of what each window sees, of codes (batch, height, width, channels). */
void windows_i8(const int8_t *x, int8_t *rows, const window *v, int threads)
{
    const int64_t channels = v->channels, length = v->kernel_width * channels;
    _Pragma("omp parallel for schedule(static) num_threads(threads)")
    for (int64_t row = 0; row < v->batch * v->out_height; row++) {
        const int64_t b = row / v->out_height, oh = row % v->out_height;
        const int8_t *xb = x + b * v->height * v->width * channels;
        int8_t *out = rows + row * v->out_width * v->kernel_height * length;
        for (int64_t ow = 0; ow < v->out_width; ow++)
            for (int64_t kh = 0; kh < v->kernel_height; kh++, out += length) {
                const int64_t h = line_of(v, oh, kh), left = ow * v->stride_width - v->before_width;
                if (h < 0) memset(out, 0, length);
                else if (v->dilation_width == 1 && left >= 0 && left + v->kernel_width <= v->width)
                    memcpy(out, xb + (h * v->width + left) * channels, length);
                else
                    for (int64_t kw = 0; kw < v->kernel_width; kw++) {
                        const int64_t c = column_of(v, ow, kw);
                        if (c < 0) memset(out + kw * channels, 0, channels);
                        else memcpy(out + kw * channels, xb + (h * v->width + c) * channels, channels);
                    }
            }
    }
}

BY_CHANNEL(f32)
BY_CHANNEL(bf16)
BY_CHANNEL(f16)
DEPTHWISE(f32)
DEPTHWISE(bf16)
DEPTHWISE(f16)

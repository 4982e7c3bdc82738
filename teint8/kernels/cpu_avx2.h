/* The matmul where the CPU has AVX2 and nothing newer: codes become 16-bit numbers, of which one instruction multiplies 16 and adds pairs.
 * A pair of products is at most 2 * 127 * 127, so that int32 holds what int32 must. Rows are multiplied with rows as they lie. */
static inline void avx2_place(const int8_t *rows, int64_t ldr, int64_t count, int8_t *codes, int64_t first, int64_t kp)
{
    for (int64_t i = 0; i < count; i++) memcpy(codes + (first + i) * kp, rows + i * ldr, kp);
}
static inline void avx2_begin(void) {}
static inline void avx2_end(void) {}

/* 32 channels of w (n, k), from channel c, with zeros past the edges. */
static inline void avx2_pack(const int8_t *w, int64_t c, int64_t n, int64_t k, int8_t *panel, int8_t *stage, int64_t kp)
{
    (void)stage;
    for (int64_t i = 0; i < 32; i++) {
        const int64_t count = c + i < n ? k : 0;
        memcpy(panel + i * kp, w + (c + i) * k, count);
        memset(panel + i * kp + count, 0, kp - count);
    }
}

/* The sums of four vectors, side by side. */
static inline __m128i avx2_four(__m256i a, __m256i b, __m256i c, __m256i d)
{
    const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

/* 2 rows of codes (row stride kp) by 32 channels, four at a time: 8 registers of sums. */
#define AVX2_ROWS 2
static inline void avx2_block(const int8_t *a, const int8_t *b, int64_t kp, int32_t *sums)
{
    for (int c = 0; c < 32; c += 4) {
        __m256i s[AVX2_ROWS][4];
        for (int r = 0; r < AVX2_ROWS; r++)
            for (int i = 0; i < 4; i++) s[r][i] = _mm256_setzero_si256();
        for (int64_t j = 0; j < kp; j += 16) {
            __m256i x[AVX2_ROWS];
            for (int r = 0; r < AVX2_ROWS; r++) x[r] = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i *)(a + r * kp + j)));
            for (int i = 0; i < 4; i++) {
                const __m256i y = _mm256_cvtepi8_epi16(_mm_load_si128((const __m128i *)(b + (c + i) * kp + j)));
                for (int r = 0; r < AVX2_ROWS; r++) s[r][i] = _mm256_add_epi32(s[r][i], _mm256_madd_epi16(x[r], y));
            }
        }
        for (int r = 0; r < AVX2_ROWS; r++)
            _mm_storeu_si128((__m128i *)(sums + r * 32 + c), avx2_four(s[r][0], s[r][1], s[r][2], s[r][3]));
    }
}
LINEAR(avx2, AVX2_ROWS, f32)
LINEAR(avx2, AVX2_ROWS, bf16)
LINEAR(avx2, AVX2_ROWS, f16)

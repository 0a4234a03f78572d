// 3x3x3 convolutions of bf16 video on CPUs with AVX-512 BF16, and the norm and SiLU before them. Used by winograd.py.
//
// A frame is [rows][row][c], with a border of zeros that is never written: one pixel above and left, one or more below and
// right. Frames are handed over as pointers, so a past frame stays where it is: nothing is concatenated or padded. A null
// pointer is a frame before the first: its taps are not computed. Sums are float32 from the first product to the output.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;
using i64 = int64_t;

namespace {

inline __m512 load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline __m512 load(const bf16* p, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

inline void store(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

inline void store(bf16* p, __m512 x, __mmask16 mask) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

// C[MR][16 NV] (+)= A[MR][k] B[k][16 NV]; B in pairs of k: [k / 2][16 NV][2].
template <int MR, int NV>
void product(const bf16* a, i64 lda, const bf16* b, i64 k, float* c, i64 ldc, bool add) {
    __m512 sum[MR][NV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) sum[m][v] = add ? _mm512_loadu_ps(c + m * ldc + 16 * v) : _mm512_setzero_ps();
    for (i64 i = 0; i < k; i += 2, b += 32 * NV) {
        __m512bh right[NV];
        for (int v = 0; v < NV; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + 32 * v);
        for (int m = 0; m < MR; m++) {
            int pair;
            std::memcpy(&pair, a + m * lda + i, 4);
            const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < NV; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], left, right[v]);
        }
    }
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) _mm512_storeu_ps(c + m * ldc + 16 * v, sum[m][v]);
}

using Product = void (*)(const bf16*, i64, const bf16*, i64, float*, i64, bool);
template <int NV>
Product rows(int m) {
    static const Product table[] = {product<1, NV>, product<2, NV>, product<3, NV>, product<4, NV>,
                                    product<5, NV>, product<6, NV>, product<7, NV>, product<8, NV>};
    return table[m - 1];
}

Product choose(int nv, int m) {
    return nv == 1 ? rows<1>(m) : nv == 2 ? rows<2>(m) : nv == 3 ? rows<3>(m) : rows<4>(m);
}

// As many rows as 32 registers hold: 6 x 4, 8 x 3, 8 x 2, 8 x 1 sums.
void products(int nv, const bf16* a, i64 lda, const bf16* b, i64 k, float* c, i64 ldc, bool add, int m) {
    const int most = nv == 4 ? 6 : 8;
    for (int i = 0; i < m; i += most)
        choose(nv, std::min(most, m - i))(a + i * lda, lda, b, k, c + i * ldc, ldc, add);
}

inline void input_1d(const __m512* d, __m512* v, int step) {
    v[0] = d[0] - d[2 * step];
    v[step] = d[step] + d[2 * step];
    v[2 * step] = d[2 * step] - d[step];
    v[3 * step] = d[step] - d[3 * step];
}

// The 4 x 4 pixels from p on, as 16 numbers per channel in the domain where the convolution is a product.
void transform_tile(const bf16* p, i64 row, i64 channels, bf16* out, i64 stride) {
    for (i64 c = 0; c < channels; c += 16) {
        __m512 d[16], half[16], v[16];
        for (int y = 0; y < 4; y++)
            for (int x = 0; x < 4; x++) d[4 * y + x] = load(p + (y * row + x) * channels + c);
        for (int x = 0; x < 4; x++) input_1d(d + x, half + x, 4);
        for (int y = 0; y < 4; y++) input_1d(half + 4 * y, v + 4 * y, 1);
        for (int i = 0; i < 16; i++) store(out + i * stride + c, v[i]);
    }
}

struct Shape {
    i64 clips, frames, height, width, row, channels, outputs, block;  // row: pixels of a padded row; block: 16 nv
    i64 blocks() const { return (outputs + block - 1) / block; }
};

// One output pixel's 16 channels: bias and, perhaps, a residual added in float32, then rounded once.
inline void finish(__m512 y, const float* bias, const bf16* residual, bf16* out, __mmask16 mask) {
    y = y + _mm512_maskz_loadu_ps(mask, bias);
    if (residual) y = y + load(residual, mask);
    store(out, y, mask);
}

void write_tile(const Shape& s, const float* m, i64 stride, i64 y0, i64 x0, i64 first, const float* bias,
                const bf16* residual, bf16* out) {
    for (i64 c = 0; c < s.block && first + c < s.outputs; c += 16) {
        const __mmask16 mask = s.outputs - first - c >= 16 ? 0xffff : (1 << (s.outputs - first - c)) - 1;
        __m512 half[2][4], y[4];
        for (int x = 0; x < 4; x++) {
            const __m512 m0 = _mm512_loadu_ps(m + x * stride + c), m1 = _mm512_loadu_ps(m + (4 + x) * stride + c);
            const __m512 m2 = _mm512_loadu_ps(m + (8 + x) * stride + c), m3 = _mm512_loadu_ps(m + (12 + x) * stride + c);
            half[0][x] = m0 + m1 + m2;
            half[1][x] = m1 - m2 - m3;
        }
        for (int r = 0; r < 2; r++) {
            y[2 * r] = half[r][0] + half[r][1] + half[r][2];
            y[2 * r + 1] = half[r][1] - half[r][2] - half[r][3];
        }
        for (int r = 0; r < 2 && y0 + r < s.height; r++)
            for (int q = 0; q < 2 && x0 + q < s.width; q++) {
                const i64 at = ((y0 + r) * s.width + x0 + q) * s.outputs + first + c;
                finish(y[2 * r + q], bias + first + c, residual ? residual + at : nullptr, out + at, mask);
            }
    }
}

}  // namespace

extern "C" {

// frames[clip][2 + frames]: where the two frames before and the frames themselves are. weight: [block][16][3 channels / 2]
// [16 nv][2]. out and residual (or null): [clip][frame][height][width][outputs]. values: scratch of 16 * tiles * (frames + 2)
// * channels; sums: scratch of threads * 16 * part * frames * block float32, where part tiles are worked on at a time.
void winograd(const Shape* shape, const bf16* const* frames, const bf16* weight, const float* bias, const bf16* residual,
              bf16* out, bf16* values, i64 tiles, float* sums, i64 part, int threads) {
    const Shape s = *shape;
    const i64 across = (s.width + 1) / 2, all = (s.height + 1) / 2 * across, times = s.frames + 2;
    const i64 stride = tiles * times * s.channels, area = s.height * s.width * s.outputs;
    const int nv = s.block / 16;
    for (i64 clip = 0; clip < s.clips; clip++) {
        const bf16* const* given = frames + clip * times;
        int missing = 0;
        while (missing < 2 && !given[missing]) missing++;
        for (i64 start = 0; start < all; start += tiles) {
            const i64 count = std::min(tiles, all - start), parts = (count + part - 1) / part;
#pragma omp parallel num_threads(threads)
            {
#pragma omp for schedule(static) collapse(2)
                for (i64 tile = 0; tile < count; tile++)
                    for (i64 t = 0; t < times; t++) {
                        if (t < missing) continue;
                        const i64 y = (start + tile) / across * 2, x = (start + tile) % across * 2;
                        transform_tile(given[t] + (y * s.row + x) * s.channels, s.row, s.channels,
                                       values + (tile * times + t) * s.channels, stride);
                    }
                float* own = sums + omp_get_thread_num() * 16 * part * s.frames * s.block;
#pragma omp for schedule(dynamic) collapse(2)
                for (i64 n = 0; n < s.blocks(); n++)
                    for (i64 p = 0; p < parts; p++) {
                        const i64 begin = p * part, size = std::min(part, count - begin), lda = times * s.channels;
                        const i64 step = s.frames * part * s.block;
                        for (int i = 0; i < 16; i++)
                            for (i64 t = 0; t < s.frames; t++) {
                                const i64 skip = std::max<i64>(0, missing - t);
                                const bf16* b = weight + ((n * 16 + i) * 3 + skip) * s.channels * s.block;
                                products(nv, values + i * stride + begin * lda + (t + skip) * s.channels, lda, b,
                                         (3 - skip) * s.channels, own + i * step + t * part * s.block, s.block, false,
                                         size);
                            }
                        for (i64 t = 0; t < s.frames; t++)
                            for (i64 j = 0; j < size; j++) {
                                const i64 tile = start + begin + j, at = (clip * s.frames + t) * area;
                                write_tile(s, own + (t * part + j) * s.block, step, tile / across * 2,
                                           tile % across * 2, n * s.block, bias, residual ? residual + at : nullptr,
                                           out + at);
                            }
                    }
            }
        }
    }
}

// The same without a transform: 27 taps, of which three in a row of pixels are one product. weight: [block][3][3]
// [3 channels / 2][16 nv][2]; sums: threads * width * block float32.
void direct(const Shape* shape, const bf16* const* frames, const bf16* weight, const float* bias, const bf16* residual,
            bf16* out, float* sums, int threads) {
    const Shape s = *shape;
    const int nv = s.block / 16;
#pragma omp parallel for schedule(dynamic) collapse(3) num_threads(threads)
    for (i64 n = 0; n < s.blocks(); n++)
        for (i64 frame = 0; frame < s.clips * s.frames; frame++)
            for (i64 y = 0; y < s.height; y++) {
                float* own = sums + omp_get_thread_num() * s.width * s.block;
                const i64 clip = frame / s.frames, t = frame % s.frames;
                bool add = false;
                for (i64 kt = 0; kt < 3; kt++) {
                    const bf16* given = frames[clip * (s.frames + 2) + t + kt];
                    if (!given) continue;
                    for (i64 ky = 0; ky < 3; ky++) {
                        const bf16* b = weight + ((n * 3 + kt) * 3 + ky) * 3 * s.channels * s.block;
                        products(nv, given + (y + ky) * s.row * s.channels, s.channels, b, 3 * s.channels, own, s.block,
                                 add, s.width);
                        add = true;
                    }
                }
                for (i64 x = 0; x < s.width; x++)
                    for (i64 c = 0; c < s.block && n * s.block + c < s.outputs; c += 16) {
                        const i64 o = n * s.block + c, at = ((frame * s.height + y) * s.width + x) * s.outputs + o;
                        const __mmask16 mask = s.outputs - o >= 16 ? 0xffff : (1 << (s.outputs - o)) - 1;
                        finish(_mm512_loadu_ps(own + x * s.block + c), bias + o, residual ? residual + at : nullptr,
                               out + at, mask);
                    }
            }
}

// SiLU of a norm, into padded frames: v = (x - mean) / sqrt(sum of squares + least) gain + shift over a pixel's channels, where
// the mean is taken off if centred, and shift may be null. x: [clip * frame][height][width][channels]; frames: one pointer each.
void norm_silu(const bf16* x, bf16* const* frames, const float* gain, const float* shift, float least, int centred,
               i64 count, i64 height, i64 width, i64 row, i64 channels, int threads) {
    const __m512 one = _mm512_set1_ps(1.0f), inverse_ln2 = _mm512_set1_ps(1.44269504f);
    const float terms[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
    for (i64 f = 0; f < count; f++)
        for (i64 y = 0; y < height; y++)
            for (i64 i = 0; i < width; i++) {
                const bf16* from = x + ((f * height + y) * width + i) * channels;
                bf16* to = frames[f] + ((y + 1) * row + i + 1) * channels;
                __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
                if (centred)
                    for (i64 c = 0; c < channels; c += 16) sum = sum + load(from + c);
                const __m512 mean = _mm512_set1_ps(centred ? _mm512_reduce_add_ps(sum) / channels : 0.0f);
                for (i64 c = 0; c < channels; c += 16) {
                    const __m512 v = load(from + c) - mean;
                    squares = _mm512_fmadd_ps(v, v, squares);
                }
                const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) + least));
                for (i64 c = 0; c < channels; c += 16) {
                    __m512 v = (load(from + c) - mean) * scale * _mm512_loadu_ps(gain + c);
                    if (shift) v = v + _mm512_loadu_ps(shift + c);
                    // exp(-v) = 2^n 2^r, |r| <= 1/2, by Taylor's series of 2^r: 1e-7 of the value. NaN stays NaN, as
                    // it passes through v itself; the clamp keeps 2^n finite, and v / (1 + 2^126) is 0 in bf16 anyway.
                    __m512 e = _mm512_setzero_ps() - v * inverse_ln2;
                    e = _mm512_max_ps(_mm512_min_ps(e, _mm512_set1_ps(126.0f)), _mm512_set1_ps(-126.0f));
                    const __m512 n = _mm512_roundscale_ps(e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
                    __m512 series = _mm512_set1_ps(1.54035304e-4f);
                    for (const float k : terms) series = _mm512_fmadd_ps(series, e - n, _mm512_set1_ps(k));
                    store(to + c, _mm512_div_ps(v, one + _mm512_scalef_ps(series, n)));
                }
            }
}
}

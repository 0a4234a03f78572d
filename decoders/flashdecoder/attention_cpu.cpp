// Grouped-query attention forward for bfloat16 with head dimension 64, no mask, on processors with AVX512-BF16.
//
// Online softmax over blocks of 64 keys (Dao, arXiv 2307.08691). Keys and values are first laid out in pairs, as the
// instruction that multiplies pairs wants them; then 6 rows at a time hold their 6 x 64 scores, or outputs, in 24
// registers. A group's heads are more rows of one head. Scores and sums are float32, probabilities are rounded to
// bfloat16 for the second product, as in torch's own kernel.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int D = 64, KEYS = 64, ROWS = 6, GROUPS_OF_ROWS = 8, BLOCK = ROWS * GROUPS_OF_ROWS;
using bf16 = uint16_t;

// 2^x for x <= 0: relative error below 1e-5 before rounding; below 2^-126 as good as nothing.
inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.33335581e-3f);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.61812911e-3f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.55041087e-2f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.40226507e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.93147181e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

inline __m512bh pair_everywhere(const bf16* at) {
  int32_t pair;
  std::memcpy(&pair, at, sizeof pair);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

inline __m512bh load(const bf16* at) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(at)); }

// sums[6][64] += rows[6][64] times a block of 32 pairs x 64 columns x 2.
inline void multiply(__m512 sums[ROWS][4], const bf16* rows, const bf16* block) {
  for (int pair = 0; pair < 32; ++pair) {
    __m512bh columns[4];
    for (int c = 0; c < 4; ++c) columns[c] = load(block + pair * 128 + c * 32);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh value = pair_everywhere(rows + r * 64 + pair * 2);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], value, columns[c]);
    }
  }
}

struct Rows {  // of one thread: a block of queries and what is known of their outputs
  alignas(64) bf16 query[BLOCK * D];
  alignas(64) float mixed[BLOCK][D];
  alignas(64) float total[BLOCK][16];
  float highest[BLOCK];
};

void attend_block(Rows& rows, int group, const bf16* keys, const bf16* values, int valid, float factor) {
  alignas(64) bf16 chance[ROWS * KEYS];
  __m512 sums[ROWS][4];
  for (auto& row : sums)
    for (auto& part : row) part = _mm512_setzero_ps();
  multiply(sums, rows.query + group * ROWS * D, keys);
  if (valid < KEYS)
    for (int c = 0; c < 4; ++c) {
      const int here = valid - 16 * c;
      const __mmask16 known = here >= 16 ? 0xFFFF : here <= 0 ? 0 : (1u << here) - 1;
      for (auto& row : sums) row[c] = _mm512_mask_blend_ps(known, _mm512_set1_ps(-3e38f), row[c]);
    }
  float rescale[ROWS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    const int row = group * ROWS + r;
    const __m512 highest = _mm512_max_ps(_mm512_max_ps(sums[r][0], sums[r][1]), _mm512_max_ps(sums[r][2], sums[r][3]));
    const float found = _mm512_reduce_max_ps(highest) * factor, before = rows.highest[row];
    rescale[r] = 1.0f;
    if (found > before) {
      rows.highest[row] = found;
      rescale[r] = _mm512_cvtss_f32(power_of_two(_mm512_set1_ps(before - found)));
    }
    const __m512 shift = _mm512_set1_ps(rows.highest[row]), scale = _mm512_set1_ps(factor);
    __m512 total = _mm512_mul_ps(_mm512_load_ps(rows.total[row]), _mm512_set1_ps(rescale[r]));
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512 p = power_of_two(_mm512_fmsub_ps(sums[r][c], scale, shift));
      total = _mm512_add_ps(total, p);
      const __m256bh rounded = _mm512_cvtneps_pbh(p);
      _mm256_store_si256(reinterpret_cast<__m256i*>(chance + r * KEYS + c * 16), reinterpret_cast<__m256i>(rounded));
    }
    _mm512_store_ps(rows.total[row], total);
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < 4; ++c)
      sums[r][c] = _mm512_mul_ps(_mm512_load_ps(rows.mixed[group * ROWS + r] + c * 16), _mm512_set1_ps(rescale[r]));
  multiply(sums, chance, values);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < 4; ++c) _mm512_store_ps(rows.mixed[group * ROWS + r] + c * 16, sums[r][c]);
}

}  // namespace

// q "b s N d", k and v "b m G d" (strides in elements, last axis contiguous), out "b s N d" contiguous; scratch holds
// 2 * b * G * blocks * 4096 values with blocks = ceil(m / 64).
extern "C" void attention_bf16(const bf16* q, const bf16* k, const bf16* v, bf16* out, bf16* scratch, int64_t clips,
                               int64_t queries, int64_t heads, int64_t keys, int64_t groups, const int64_t* q_strides,
                               const int64_t* k_strides, const int64_t* v_strides, int threads) {
  const int64_t blocks = (keys + KEYS - 1) / KEYS, share = heads / groups, size = KEYS * D;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t unit = 0; unit < clips * groups * blocks; ++unit) {
    const int64_t block = unit % blocks, g = unit / blocks % groups, b = unit / blocks / groups;
    bf16 *at_k = scratch + 2 * unit * size, *at_v = at_k + size;
    for (int64_t j = 0; j < KEYS; ++j) {
      const int64_t key = block * KEYS + j;
      const bool known = key < keys;
      const bf16* from_k = k + b * k_strides[0] + key * k_strides[1] + g * k_strides[2];
      const bf16* from_v = v + b * v_strides[0] + key * v_strides[1] + g * v_strides[2];
      for (int d = 0; d < D; ++d) {
        at_k[(d / 2 * KEYS + j) * 2 + d % 2] = known ? from_k[d] : 0;
        at_v[(j / 2 * D + d) * 2 + j % 2] = known ? from_v[d] : 0;
      }
    }
  }
  const int64_t folded = share * queries, row_blocks = (folded + BLOCK - 1) / BLOCK;
  const float factor = 0.125f * 1.44269504088896f;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t unit = 0; unit < clips * groups * row_blocks; ++unit) {
    const int64_t begin = unit % row_blocks * BLOCK, g = unit / row_blocks % groups, b = unit / row_blocks / groups;
    Rows rows;
    std::memset(rows.mixed, 0, sizeof rows.mixed);
    std::memset(rows.total, 0, sizeof rows.total);
    for (int row = 0; row < BLOCK; ++row) {
      const int64_t at = begin + row, head = g * share + at / queries;
      rows.highest[row] = -3e38f;
      if (at < folded)
        std::memcpy(rows.query + row * D, q + b * q_strides[0] + at % queries * q_strides[1] + head * q_strides[2], 2 * D);
      else
        std::memset(rows.query + row * D, 0, 2 * D);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const bf16* at_k = scratch + 2 * ((b * groups + g) * blocks + block) * size;
      const int valid = keys - block * KEYS < KEYS ? static_cast<int>(keys - block * KEYS) : KEYS;
      for (int group = 0; group < GROUPS_OF_ROWS; ++group) attend_block(rows, group, at_k, at_k + size, valid, factor);
    }
    for (int row = 0; row < BLOCK && begin + row < folded; ++row) {
      const int64_t at = begin + row, head = g * share + at / queries;
      const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(rows.total[row])));
      bf16* to = out + ((b * queries + at % queries) * heads + head) * D;
      for (int c = 0; c < 4; ++c) {
        const __m512 value = _mm512_mul_ps(_mm512_load_ps(rows.mixed[row] + c * 16), inverse);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c * 16),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
      }
    }
  }
}

/* Kernels of a training step, once for float and once for bfloat16 (suffixes _f32, _bf16).

   Matrices are row by row; `ld` is the distance between rows in elements. Every loop over rows runs
   in the OpenMP threads that torch uses, and no sum crosses rows: results do not depend on the
   number of threads. Values that are not finite stay so. */

#ifndef T
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float load_bf16(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static inline bf16 store_bf16(float value) { /* rounded to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded); /* NaN stays NaN */
}

/* e^x to 1e-7 relative: Cephes' reduction to [-ln 2 / 2, ln 2 / 2], Taylor coefficients of 2^f. */
static inline float fast_exp(float x) {
    float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = floorf(bounded * 1.44269504f + 0.5f);
    float f = ((bounded - n * 0.693359375f) + n * 2.12194440e-4f) * 1.44269504f;
    float p = 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    int32_t bits = (int32_t)n * (1 << 23), power;
    memcpy(&power, &p, 4);
    bits += power;
    memcpy(&p, &bits, 4);
    return x != x ? x : p;
}

/* 0 where fast_exp is bounded: times the largest floats its bound would count. */
static inline float sigmoid(float x) { return x < -88.0f ? 0.0f : 1.0f / (1.0f + fast_exp(-x)); }

/* tanh of the approximated GELU. */
#define GELU_C 0.7978845608f
static inline float gelu_tanh(float x) { return 2.0f * sigmoid(2.0f * GELU_C * (x + 0.044715f * x * x * x)) - 1.0f; }

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define BLOCK 4        /* sums of a product at once */
#define PREFETCH 4096  /* bytes ahead of what is read */

typedef float vector __attribute__((vector_size(4 * LANES))); /* one register or several, as the CPU has them */
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t chars __attribute__((vector_size(LANES)));

typedef struct {
    const void *values; /* (rows, size) */
    const float *scale; /* (rows,), of int8 */
    int64_t size;
} matrix;

/* Copy LANES values of `width` bytes each. */
INLINE void fetch(matrix m, int64_t row, int64_t k, int64_t width, void *to) {
    const char *from = (const char *)m.values + (row * m.size + k) * width;
    __builtin_prefetch(from + PREFETCH);
    memcpy(to, from, LANES * width);
}

INLINE vector vector_f32(matrix m, int64_t row, int64_t k) {
    vector result;
    fetch(m, row, k, sizeof(float), &result);
    return result;
}

INLINE vector vector_bf16(matrix m, int64_t row, int64_t k) {
    halves values;
    fetch(m, row, k, sizeof(bf16), &values);
    words bits = __builtin_convertvector(values, words) << 16;
    vector result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

INLINE vector vector_int8(matrix m, int64_t row, int64_t k) {
    chars values;
    fetch(m, row, k, sizeof(int8_t), &values);
    shorts wider = __builtin_convertvector(values, shorts); /* gcc widens well only to twice the size */
    return __builtin_convertvector(__builtin_convertvector(wider, ints), vector);
}

INLINE float total(vector v) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

INLINE float one_f32(matrix m, int64_t row, int64_t k) { return ((const float *)m.values)[row * m.size + k]; }
INLINE float one_bf16(matrix m, int64_t row, int64_t k) { return load_bf16(((const bf16 *)m.values)[row * m.size + k]); }
INLINE float one_int8(matrix m, int64_t row, int64_t k) { return ((const int8_t *)m.values)[row * m.size + k]; }

INLINE float finish_f32(matrix m, int64_t row, float sum) { return sum; }
INLINE float finish_bf16(matrix m, int64_t row, float sum) { return load_bf16(store_bf16(sum)); } /* as torch's */
INLINE float finish_int8(matrix m, int64_t row, float sum) { return sum * m.scale[row]; }

/* out (rows, size_out) = x (rows, size_in) weight' for few rows, as fast as the weight is read. */
#define PRODUCT(kind, type)                                                                                         \
    INLINE float dot_##kind(matrix x, int64_t row, matrix m, int64_t n) {                                           \
        vector parts[BLOCK] = {{0}};                                                                                \
        int64_t k = 0;                                                                                              \
        for (; k + BLOCK * LANES <= m.size; k += BLOCK * LANES)                                                     \
            for (int b = 0; b < BLOCK; b++)                                                                         \
                parts[b] += vector_f32(x, row, k + b * LANES) * vector_##kind(m, n, k + b * LANES);                 \
        for (; k + LANES <= m.size; k += LANES) parts[0] += vector_f32(x, row, k) * vector_##kind(m, n, k);         \
        float sum = total((parts[0] + parts[1]) + (parts[2] + parts[3]));                                           \
        for (; k < m.size; k++) sum += one_f32(x, row, k) * one_##kind(m, n, k);                                    \
        return finish_##kind(m, n, sum);                                                                            \
    }                                                                                                               \
    INLINE void dots_##kind(matrix x, int64_t row, matrix m, int64_t n, float *out, int64_t size_out) {             \
        vector parts[BLOCK] = {{0}};                                                                                \
        int64_t k = 0;                                                                                              \
        for (; k + LANES <= m.size; k += LANES) {                                                                   \
            vector weight = vector_##kind(m, n, k);                                                                 \
            for (int b = 0; b < BLOCK; b++) parts[b] += vector_f32(x, row + b, k) * weight;                         \
        }                                                                                                           \
        for (int b = 0; b < BLOCK; b++) {                                                                           \
            float sum = total(parts[b]);                                                                            \
            for (int64_t rest = k; rest < m.size; rest++) sum += one_f32(x, row + b, rest) * one_##kind(m, n, rest); \
            out[(row + b) * size_out + n] = finish_##kind(m, n, sum);                                               \
        }                                                                                                           \
    }                                                                                                               \
    void product_##kind(const float *x, const type *values, const float *scale, float *out, int64_t rows,           \
                        int64_t size_in, int64_t size_out) {                                                        \
        matrix m = {values, scale, size_in}, inputs = {x, 0, size_in};                                              \
        _Pragma("omp parallel for schedule(static)") for (int64_t n = 0; n < size_out; n++) {                       \
            int64_t row = 0;                                                                                        \
            for (; row + BLOCK <= rows; row += BLOCK) dots_##kind(inputs, row, m, n, out, size_out);                \
            for (; row < rows; row++) out[row * size_out + n] = dot_##kind(inputs, row, m, n);                      \
        }                                                                                                           \
    }

PRODUCT(f32, float)
PRODUCT(bf16, bf16)
PRODUCT(int8, int8_t)

/* Rotated by (cos, sin) of each pair; pairs come out adjacent, of queries and keys alike. NULL: as it is. */
INLINE void rotate(const float *x, const float *rotation, float *out, int64_t head) {
    if (!rotation) memcpy(out, x, head * sizeof(float));
    for (int64_t i = 0, half = head / 2; rotation && i < half; i++) {
        out[2 * i] = x[i] * rotation[2 * i] - x[half + i] * rotation[2 * i + 1];
        out[2 * i + 1] = x[i] * rotation[2 * i + 1] + x[half + i] * rotation[2 * i];
    }
}

/* Begin to read `size` floats into the caches: the CPU does not guess where the next block is. */
INLINE void fetch_ahead(const float *from, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) __builtin_prefetch(from + i);
}

/* One new token in each row: its key and value are written as those of token `lengths[row]` - 1, and it attends to all.
   blocks (rows, width): addresses of blocks (layers, 2, kv_heads, block, head) of `block` tokens each, which have the layer
   after `offset` floats. qkv (rows, heads + 2 * kv_heads, head) -> out (rows, heads, head); rotation (rows, head / 2)
   pairs; scores (rows, heads, longest) is overwritten. */
void decode_attention_f32(const float *qkv, const float *rotation, const int64_t *blocks, const int64_t *lengths,
                          float *scores, float *out, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head,
                          int64_t block, int64_t width, int64_t longest, int64_t offset) {
    int64_t group = heads / kv_heads;
    float scaling = 1.0f / sqrtf(head);
#pragma omp parallel for schedule(dynamic) if (rows * heads * longest > 1024)
    for (int64_t task = 0; task < rows * kv_heads; task++) {
        int64_t row = task / kv_heads, kv = task % kv_heads, length = lengths[row], last = length - 1;
        int64_t keys = offset + kv * block * head, values = keys + kv_heads * block * head;
        const int64_t *row_blocks = blocks + row * width;
        const float *own = qkv + row * (heads + 2 * kv_heads) * head, *turn = rotation ? rotation + row * head : 0;
        float *o = out + (row * heads + kv * group) * head, *s = scores + (row * heads + kv * group) * longest;
        float *newest = (float *)row_blocks[last / block] + last % block * head;
        rotate(own + (heads + kv) * head, turn, newest + keys, head);
        memcpy(newest + values, own + (heads + kv_heads + kv) * head, head * sizeof(float));
        for (int64_t h = 0; h < group; h++) rotate(own + (kv * group + h) * head, turn, o + h * head, head);
        for (int64_t start = 0; start < length; start += block) {
            const float *k = (const float *)row_blocks[start / block] + keys;
            const float *next = start / block < last / block ? (const float *)row_blocks[start / block + 1] + keys
                                                             : (const float *)row_blocks[0] + values;
            int64_t count = length - start < block ? length - start : block;
            for (int64_t h = 0; h < group; h++)
                for (int64_t j = 0; j < count; j++) {
                    float dot = 0;
                    if (!h) fetch_ahead(next + j * head, head);
#pragma omp simd reduction(+ : dot)
                    for (int64_t d = 0; d < head; d++) dot += o[h * head + d] * k[j * head + d];
                    s[h * longest + start + j] = dot * scaling;
                }
        }
        for (int64_t h = 0; h < group; h++) {
            float *a = s + h * longest, largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t j = 0; j < length; j++) largest = a[j] > largest ? a[j] : largest;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < length; j++) {
                a[j] = fast_exp(a[j] - largest);
                sum += a[j];
            }
            for (int64_t j = 0; j < length; j++) a[j] /= sum;
            memset(o + h * head, 0, head * sizeof(float));
        }
        for (int64_t start = 0; start < length; start += block) {
            const float *v = (const float *)row_blocks[start / block] + values;
            const float *next = (const float *)row_blocks[start / block < last / block ? start / block + 1 : 0] + values;
            int64_t count = length - start < block ? length - start : block;
            for (int64_t h = 0; h < group; h++)
                for (int64_t j = 0; j < count; j++) {
                    float p = s[h * longest + start + j];
                    if (!h) fetch_ahead(next + j * head, head);
#pragma omp simd
                    for (int64_t d = 0; d < head; d++) o[h * head + d] += p * v[j * head + d];
                }
        }
    }
}

#define T float
#define NAME(name) name##_f32
#define LOAD(value) (value)
#define STORE(value) (value)
#include "native.c"
#undef T
#undef NAME
#undef LOAD
#undef STORE
#define T bf16
#define NAME(name) name##_bf16
#define LOAD(value) load_bf16(value)
#define STORE(value) store_bf16(value)
#include "native.c"

#else

/* out = x / rms(x) * weight; `scale` (rows,) receives 1 / rms. */
void NAME(rms_norm)(const T *x, const T *weight, T *out, float *scale, int64_t rows, int64_t size, int64_t ld_out, float eps) {
#pragma omp parallel for schedule(static) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) {
        const T *a = x + row * size;
        T *o = out + row * ld_out;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < size; j++) sum += LOAD(a[j]) * LOAD(a[j]);
        float r = scale[row] = 1.0f / sqrtf(sum / size + eps);
#pragma omp simd
        for (int64_t j = 0; j < size; j++) o[j] = STORE(LOAD(a[j]) * r * LOAD(weight[j]));
    }
}

/* dx = (gradient through the norm) + residual. */
void NAME(rms_norm_backward)(const T *grad, const T *x, const T *weight, const float *scale, const T *residual, T *dx,
                             int64_t rows, int64_t size, int64_t ld_residual, int64_t ld_dx) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *a = x + row * size, *g = grad + row * size, *rest = residual + row * ld_residual;
        T *o = dx + row * ld_dx;
        float sum = 0, r = scale[row];
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < size; j++) sum += LOAD(g[j]) * LOAD(weight[j]) * LOAD(a[j]);
        float c = sum * r * r * r / size;
#pragma omp simd
        for (int64_t j = 0; j < size; j++) o[j] = STORE(LOAD(rest[j]) + r * LOAD(g[j]) * LOAD(weight[j]) - LOAD(a[j]) * c);
    }
}

/* LayerNorm; `stats` (rows, 2) receives mean and 1 / standard deviation. */
void NAME(layer_norm)(const T *x, const T *weight, const T *bias, T *out, float *stats, int64_t rows, int64_t size,
                      int64_t ld_out, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *a = x + row * size;
        T *o = out + row * ld_out;
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < size; j++) sum += LOAD(a[j]);
        float mean = stats[2 * row] = sum / size;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < size; j++) squares += (LOAD(a[j]) - mean) * (LOAD(a[j]) - mean);
        float r = stats[2 * row + 1] = isinf(squares) ? NAN : 1.0f / sqrtf(squares / size + eps);
#pragma omp simd
        for (int64_t j = 0; j < size; j++) o[j] = STORE((LOAD(a[j]) - mean) * r * LOAD(weight[j]) + LOAD(bias[j]));
    }
}

void NAME(layer_norm_backward)(const T *grad, const T *x, const T *weight, const float *stats, const T *residual, T *dx,
                               int64_t rows, int64_t size, int64_t ld_residual, int64_t ld_dx) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *a = x + row * size, *g = grad + row * size, *rest = residual + row * ld_residual;
        T *o = dx + row * ld_dx;
        float sum = 0, dot = 0, mean = stats[2 * row], r = stats[2 * row + 1];
#pragma omp simd reduction(+ : sum, dot)
        for (int64_t j = 0; j < size; j++) {
            float w = LOAD(g[j]) * LOAD(weight[j]);
            sum += w;
            dot += w * (LOAD(a[j]) - mean);
        }
        sum /= size;
        dot *= r * r / size;
#pragma omp simd
        for (int64_t j = 0; j < size; j++)
            o[j] = STORE(LOAD(rest[j]) + r * (LOAD(g[j]) * LOAD(weight[j]) - sum - (LOAD(a[j]) - mean) * dot));
    }
}

/* (rows, 2 size) with gate and up beside each other -> silu(gate) * up. */
void NAME(swiglu)(const T *x, T *out, int64_t rows, int64_t size, int64_t ld_out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = x + row * 2 * size, *up = gate + size;
        T *o = out + row * ld_out;
#pragma omp simd
        for (int64_t j = 0; j < size; j++) o[j] = STORE(LOAD(gate[j]) * sigmoid(LOAD(gate[j])) * LOAD(up[j]));
    }
}

void NAME(swiglu_backward)(const T *grad, const T *x, T *dx, int64_t rows, int64_t size, int64_t ld_dx) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = x + row * 2 * size, *up = gate + size, *g = grad + row * size;
        T *d_gate = dx + row * ld_dx, *d_up = d_gate + size;
#pragma omp simd
        for (int64_t j = 0; j < size; j++) {
            float a = LOAD(gate[j]), b = LOAD(up[j]), e = LOAD(g[j]), s = sigmoid(a);
            d_up[j] = STORE(e * a * s);
            d_gate[j] = STORE(e * b * s * (1.0f + a * (1.0f - s)));
        }
    }
}

/* GELU with the tanh approximation. */
void NAME(gelu)(const T *x, T *out, int64_t rows, int64_t size, int64_t ld_out) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *a = x + row * size;
        T *o = out + row * ld_out;
#pragma omp simd
        for (int64_t j = 0; j < size; j++) o[j] = STORE(0.5f * LOAD(a[j]) * (1.0f + gelu_tanh(LOAD(a[j]))));
    }
}

void NAME(gelu_backward)(const T *grad, const T *x, T *dx, int64_t rows, int64_t size, int64_t ld_dx) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *a = x + row * size, *g = grad + row * size;
        T *o = dx + row * ld_dx;
#pragma omp simd
        for (int64_t j = 0; j < size; j++) {
            float v = LOAD(a[j]), t = gelu_tanh(v);
            float slope = GELU_C * (1.0f + 3.0f * 0.044715f * v * v);
            o[j] = STORE(LOAD(g[j]) * 0.5f * (1.0f + t + v * (1.0f - t * t) * slope));
        }
    }
}

/* Split qkv (rows, (heads + 2 kv_heads) head) into q, k and v, each with all heads of a sequence one
   after another: (kv heads, length, head) from token `start` on. `sequences` (rows, 3) gives start and
   length of the sequence of each row, and its position there. q is multiplied by `scale`. Where cos and
   sin (rows, head) are not NULL, q and k are rotated. */
void NAME(split_heads)(const T *qkv, const T *cos, const T *sin, const int64_t *sequences, T *q, T *k, T *v, int64_t rows,
                       int64_t heads, int64_t kv_heads, int64_t head, float scale) {
    int64_t half = head / 2;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        int64_t start = sequences[3 * row], length = sequences[3 * row + 1], position = sequences[3 * row + 2];
        const T *in = qkv + row * (heads + 2 * kv_heads) * head;
        for (int64_t h = 0; h < heads + 2 * kv_heads; h++, in += head) {
            int64_t all = h < heads ? heads : kv_heads;
            int64_t number = h < heads ? h : h < heads + kv_heads ? h - heads : h - heads - kv_heads;
            T *out = (h < heads ? q : h < heads + kv_heads ? k : v) + (start * all + number * length + position) * head;
            float factor = h < heads ? scale : 1.0f;
            if (cos && h < heads + kv_heads) {
                const T *c = cos + row * head, *s = sin + row * head;
#pragma omp simd
                for (int64_t j = 0; j < half; j++) {
                    float a = LOAD(in[j]), b = LOAD(in[j + half]);
                    out[j] = STORE(factor * (a * LOAD(c[j]) - b * LOAD(s[j])));
                    out[j + half] = STORE(factor * (b * LOAD(c[j]) + a * LOAD(s[j])));
                }
            } else {
#pragma omp simd
                for (int64_t j = 0; j < head; j++) out[j] = STORE(factor * LOAD(in[j]));
            }
        }
    }
}

/* The reverse of split_heads, for gradients: the rotation is undone. */
void NAME(split_heads_backward)(const T *dq, const T *dk, const T *dv, const T *cos, const T *sin, const int64_t *sequences,
                                T *dqkv, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head, int64_t ld, float scale) {
    int64_t half = head / 2;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        int64_t start = sequences[3 * row], length = sequences[3 * row + 1], position = sequences[3 * row + 2];
        T *out = dqkv + row * ld;
        for (int64_t h = 0; h < heads + 2 * kv_heads; h++, out += head) {
            int64_t all = h < heads ? heads : kv_heads;
            int64_t number = h < heads ? h : h < heads + kv_heads ? h - heads : h - heads - kv_heads;
            const T *in = (h < heads ? dq : h < heads + kv_heads ? dk : dv) + (start * all + number * length + position) * head;
            float factor = h < heads ? scale : 1.0f;
            if (cos && h < heads + kv_heads) {
                const T *c = cos + row * head, *s = sin + row * head;
#pragma omp simd
                for (int64_t j = 0; j < half; j++) {
                    float a = LOAD(in[j]), b = LOAD(in[j + half]);
                    out[j] = STORE(factor * (a * LOAD(c[j]) + b * LOAD(s[j])));
                    out[j + half] = STORE(factor * (b * LOAD(c[j]) - a * LOAD(s[j])));
                }
            } else {
#pragma omp simd
                for (int64_t j = 0; j < head; j++) out[j] = STORE(factor * LOAD(in[j]));
            }
        }
    }
}

/* RMS norm of each head of q and k, in place (Qwen3); `scale` (rows, heads + kv_heads) receives 1 / rms. */
void NAME(head_norm)(T *qkv, const T *q_weight, const T *k_weight, float *scale, int64_t rows, int64_t heads, int64_t kv_heads,
                     int64_t head, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            T *a = qkv + (row * (heads + 2 * kv_heads) + h) * head;
            const T *weight = h < heads ? q_weight : k_weight;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < head; j++) sum += LOAD(a[j]) * LOAD(a[j]);
            float r = scale[row * (heads + kv_heads) + h] = 1.0f / sqrtf(sum / head + eps);
#pragma omp simd
            for (int64_t j = 0; j < head; j++) a[j] = STORE(LOAD(a[j]) * r * LOAD(weight[j]));
        }
}

/* Gradient of head_norm in place of `grad`, from x before the norm. */
void NAME(head_norm_backward)(T *grad, const T *x, const T *q_weight, const T *k_weight, const float *scale, int64_t rows,
                              int64_t heads, int64_t kv_heads, int64_t head, int64_t ld) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            const T *a = x + (row * (heads + 2 * kv_heads) + h) * head, *weight = h < heads ? q_weight : k_weight;
            T *g = grad + row * ld + h * head;
            float sum = 0, r = scale[row * (heads + kv_heads) + h];
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < head; j++) sum += LOAD(g[j]) * LOAD(weight[j]) * LOAD(a[j]);
            float c = sum * r * r * r / head;
#pragma omp simd
            for (int64_t j = 0; j < head; j++) g[j] = STORE(r * LOAD(g[j]) * LOAD(weight[j]) - LOAD(a[j]) * c);
        }
}

/* (tokens, heads head) with row distance `ld` -> heads of each sequence one after another, and back. */
void NAME(to_heads)(const T *x, const int64_t *sequences, T *out, int64_t rows, int64_t heads, int64_t head, int64_t ld) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        int64_t start = sequences[3 * row], length = sequences[3 * row + 1], position = sequences[3 * row + 2];
        for (int64_t h = 0; h < heads; h++)
            memcpy(out + (start * heads + h * length + position) * head, x + row * ld + h * head, head * sizeof(T));
    }
}

void NAME(from_heads)(const T *x, const int64_t *sequences, T *out, int64_t rows, int64_t heads, int64_t head, int64_t ld) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        int64_t start = sequences[3 * row], length = sequences[3 * row + 1], position = sequences[3 * row + 2];
        for (int64_t h = 0; h < heads; h++)
            memcpy(out + row * ld + h * head, x + (start * heads + h * length + position) * head, head * sizeof(T));
    }
}

/* Causal softmax of scores (heads, length, length) in place. */
void NAME(causal_softmax)(T *scores, int64_t heads, int64_t length) {
#pragma omp parallel for schedule(static, 16)
    for (int64_t row = 0; row < heads * length; row++) {
        int64_t count = row % length + 1;
        T *a = scores + row * length;
        float largest = -INFINITY, sum = 0, power[count];
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < count; j++) largest = LOAD(a[j]) > largest ? LOAD(a[j]) : largest;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < count; j++) {
            power[j] = fast_exp(LOAD(a[j]) - largest);
            sum += power[j];
        }
        float factor = 1.0f / sum;
#pragma omp simd
        for (int64_t j = 0; j < count; j++) a[j] = STORE(power[j] * factor);
        memset(a + count, 0, (length - count) * sizeof(T));
    }
}

/* Gradient of the scores in place of that of the probabilities. */
void NAME(causal_softmax_backward)(const T *probabilities, T *grad, int64_t heads, int64_t length) {
#pragma omp parallel for schedule(static, 16)
    for (int64_t row = 0; row < heads * length; row++) {
        int64_t count = row % length + 1;
        const T *p = probabilities + row * length;
        T *g = grad + row * length;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < count; j++) sum += LOAD(p[j]) * LOAD(g[j]);
#pragma omp simd
        for (int64_t j = 0; j < count; j++) g[j] = STORE(LOAD(p[j]) * (LOAD(g[j]) - sum));
        memset(g + count, 0, (length - count) * sizeof(T));
    }
}

/* Negative log-likelihood of each label in nats, 0 where it is negative; `with_gradient` replaces the logits
   (rows, size) by its gradient. */
void NAME(cross_entropy)(T *logits, const int64_t *labels, float *nll, int64_t rows, int64_t size, int64_t with_gradient) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T *a = logits + row * size;
        int64_t label = labels[row];
        nll[row] = 0;
        if (label < 0) {
            if (with_gradient) memset(a, 0, size * sizeof(T));
            continue;
        }
        float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < size; j++) largest = LOAD(a[j]) > largest ? LOAD(a[j]) : largest;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < size; j++) sum += fast_exp(LOAD(a[j]) - largest);
        float log_sum = logf(sum), of_label = LOAD(a[label]) - largest;
        nll[row] = log_sum - of_label;
        if (!with_gradient) continue;
        float factor = 1.0f / sum, p = fast_exp(of_label) * factor;
#pragma omp simd
        for (int64_t j = 0; j < size; j++) a[j] = STORE(fast_exp(LOAD(a[j]) - largest) * factor);
        a[label] = STORE(p - 1.0f);
    }
}

/* Write A (ranks, in) and scale * B (out, ranks) of one LoRA layer into [[W, sB], [A, 0]] with row distance `ld`. */
void NAME(write_lora)(T *a_to, T *b_to, const float *a, const float *b, int64_t ranks, int64_t size_in, int64_t size_out,
                      int64_t ld, float scale) {
    for (int64_t r = 0; r < ranks; r++)
        for (int64_t j = 0; j < size_in; j++) a_to[r * ld + j] = STORE(a[r * size_in + j]);
    for (int64_t i = 0; i < size_out; i++)
        for (int64_t r = 0; r < ranks; r++) b_to[i * ld + r] = STORE(scale * b[i * ranks + r]);
}

/* Gradients of A (ranks, in) and of B (out, ranks), from rows of those of the whole group. */
void NAME(read_lora_gradient)(const T *a_from, const T *b_from, float *a, float *b, int64_t ranks, int64_t size_in,
                              int64_t size_out, int64_t ld_a, int64_t ld_b, float scale) {
    for (int64_t r = 0; r < ranks; r++)
        for (int64_t j = 0; j < size_in; j++) a[r * size_in + j] = LOAD(a_from[r * ld_a + j]);
    for (int64_t i = 0; i < size_out; i++)
        for (int64_t r = 0; r < ranks; r++) b[i * ranks + r] = scale * LOAD(b_from[r * ld_b + i]);
}
#endif

// A cheap convolution, depthwise 3 x 3 and 1 x 1 in one go, and what comes back through it and a norm_relu after it.
#pragma once

#include "norm.h"

namespace {

constexpr int WORTH_A_THREAD = 100'000;  // multiplications; with fewer, a thread costs more than it does

struct Shape {
    int batch, height, width, in, out, stride;

    int out_height() const { return (height + stride - 1) / stride; }
    int out_width() const { return (width + stride - 1) / stride; }
    std::int64_t out_pixels() const { return (std::int64_t)batch * out_height() * out_width(); }
};

// (rows, columns) -> (columns, rows)
Buffer transposed(const float* matrix, int rows, int columns) {
    Buffer result(rows * columns);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) result[c * rows + r] = matrix[r * columns + c];
    return result;
}

// The latest three rows of an image, in float32, with a zero pixel at each end and a row of zeros for above and below.
class Window {
  public:
    Window(int width, int channels) : channels_(channels), row_((width + 2) * channels), data_(4 * row_) {}

    float* pixels(int y) { return &data_[y % 3 * row_ + channels_]; }

    // The padded rows y - 1, y and y + 1.
    void around(int y, int height, const float* rows[3]) const {
        for (int i = 0; i < 3; i++) {
            const int at = y - 1 + i;
            rows[i] = data_.data() + (at < 0 || at >= height ? 3 : at % 3) * row_;
        }
    }

  private:
    int channels_, row_;
    Buffer data_;
};

// out[i][c] = sum over t of taps[t][c] * rows[t / 3][i * stride + t % 3][c]
template <class T>
void filter_row(const float* const rows[3], const float* taps, int pixels, int channels, int stride, T* out) {
    for (int c = 0; c < channels; c += LANES) {
        Vec tap[TAPS];
        UNROLL for (int t = 0; t < TAPS; t++) tap[t] = load(taps + t * channels + c);
        int i = 0;
        for (; stride == 1 && i + AHEAD <= pixels; i += AHEAD) {
            Vec sum[AHEAD];
            UNROLL for (int j = 0; j < AHEAD; j++) sum[j] = Vec{};
            UNROLL for (int y = 0; y < 3; y++) {
                Vec pixel[AHEAD + 2];
                UNROLL for (int j = 0; j < AHEAD + 2; j++) pixel[j] = load(rows[y] + (i + j) * channels + c);
                UNROLL for (int j = 0; j < AHEAD; j++)
                    UNROLL for (int x = 0; x < 3; x++) sum[j] += tap[3 * y + x] * pixel[j + x];
            }
            UNROLL for (int j = 0; j < AHEAD; j++) store(out + (i + j) * channels + c, sum[j]);
        }
        for (; i < pixels; i++) {
            Vec sum{};
            UNROLL for (int t = 0; t < TAPS; t++)
                sum += tap[t] * load(rows[t / 3] + (i * stride + t % 3) * channels + c);
            store(out + i * channels + c, sum);
        }
    }
}

// out[i][l] = sum over k < group and t of taps[k][t][l] * rows[t / 3][i * stride + t % 3][k-th of the group of l]
// for P pixels i and the channels l from c to c + LANES; `group_starts` are the firsts of their groups.
template <int P>
[[gnu::always_inline]] inline void filter_group(
    const float* const rows[3], const float* taps, int group, int tap_step, Words group_starts, int c, int channels,
    int stride, float* out
) {
    Vec sum[P] = {};
    const int group_step = tap_step == 1 ? TAPS : 1;
    for (int k = 0; k < group; k++) {
        const int at = c - c % std::max(group, LANES) + k - k % LANES;
        const Words lanes = group_starts + k % LANES;
        UNROLL for (int y = 0; y < 3; y++) {
            Vec tap[3];
            UNROLL for (int x = 0; x < 3; x++)
                tap[x] = load(taps + (k * group_step + (3 * y + x) * tap_step) * channels + c);
            UNROLL for (int j = 0; j < P; j++) {
                UNROLL for (int x = 0; x < 3; x++)
                    sum[j] += tap[x] * permuted(load(rows[y] + (j * stride + x) * channels + at), lanes);
            }
        }
    }
    UNROLL for (int j = 0; j < P; j++) store(out + j * channels + c, sum[j]);
}

// The spatial stage of a row. Taps are (group, TAPS, channels) or, with a tap_step of `group` instead of 1,
// (TAPS, group, channels). LANES is a multiple of `group`, or `group` of LANES.
void filter_groups(
    const float* const rows[3], const float* taps, int group, int tap_step, int pixels, int channels, int stride,
    float* out
) {
    Words group_starts;  // within a register
    for (int l = 0; l < LANES; l++) group_starts[l] = l - l % group;
    for (int c = 0; c < channels; c += LANES)
        in_blocks<PIXELS>(pixels, [&](auto P, int i) {
            const int at = i * stride * channels;
            const float* from[3] = {rows[0] + at, rows[1] + at, rows[2] + at};
            float* to = out + i * channels;
            // With a constant stride, neighbors share the pixels that they load.
            stride == 1 ? filter_group<P>(from, taps, group, tap_step, group_starts, c, channels, 1, to)
                        : filter_group<P>(from, taps, group, tap_step, group_starts, c, channels, stride, to);
        });
}

// taps[t][c] += sum over i of grad[i * stride][c] * rows[t / 3][i * stride + t % 3][c]
void filter_row_grad(
    const float* const rows[3], const float* grad, int pixels, int channels, int stride, float* taps
) {
    for (int c = 0; c < channels; c += LANES) {
        Vec sum[TAPS];
        UNROLL for (int t = 0; t < TAPS; t++) sum[t] = load(taps + t * channels + c);
        int i = 0;
        for (; stride == 1 && i + AHEAD <= pixels; i += AHEAD) {
            Vec g[AHEAD];
            UNROLL for (int j = 0; j < AHEAD; j++) g[j] = load(grad + (i + j) * channels + c);
            UNROLL for (int y = 0; y < 3; y++) {
                Vec pixel[AHEAD + 2];
                UNROLL for (int j = 0; j < AHEAD + 2; j++) pixel[j] = load(rows[y] + (i + j) * channels + c);
                UNROLL for (int j = 0; j < AHEAD; j++)
                    UNROLL for (int x = 0; x < 3; x++) sum[3 * y + x] += g[j] * pixel[j + x];
            }
        }
        for (; i < pixels; i++) {
            const int at = i * stride * channels + c;
            const Vec g = load(grad + at);
            UNROLL for (int t = 0; t < TAPS; t++) sum[t] += g * load(rows[t / 3] + at + t % 3 * channels);
        }
        UNROLL for (int t = 0; t < TAPS; t++) store(taps + t * channels + c, sum[t]);
    }
}

// out (P, V * LANES of the columns) = a (P, depth) b (depth, columns), in registers
template <int P, int V, class T>
inline void multiply_block(const float* a, int depth, const float* b, int columns, T* out) {
    Vec sum[P][V];
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int v = 0; v < V; v++) sum[p][v] = Vec{};
    for (int k = 0; k < depth; k++) {
        Vec right[V];
        UNROLL for (int v = 0; v < V; v++) right[v] = load(b + k * columns + v * LANES);
        UNROLL for (int p = 0; p < P; p++)
            UNROLL for (int v = 0; v < V; v++) sum[p][v] += a[p * depth + k] * right[v];
    }
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int v = 0; v < V; v++) store(out + p * columns + v * LANES, sum[p][v]);
}

// out (pixels, columns) = a (pixels, depth) b (depth, columns)
template <class T>
void multiply(const float* a, int pixels, int depth, const float* b, int columns, T* out) {
    for (int o = 0; o < columns;) {
        const bool two = o + 2 * LANES <= columns;
        in_blocks<PIXELS>(pixels, [&](auto P, int p) {
            const float* rows = a + p * depth;
            T* to = out + p * columns + o;
            two ? multiply_block<P, 2>(rows, depth, b + o, columns, to)
                : multiply_block<P, 1>(rows, depth, b + o, columns, to);
        });
        o += two ? 2 * LANES : LANES;
    }
}

// out (R rows, V * LANES of the columns) += a (pixels, depth)^T b (pixels, columns), in registers
template <int R, int V>
inline void multiply_grad_block(const float* a, int pixels, int depth, const float* b, int columns, float* out) {
    Vec sum[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) sum[r][v] = load(out + r * columns + v * LANES);
    for (int p = 0; p < pixels; p++) {
        Vec right[V];
        UNROLL for (int v = 0; v < V; v++) right[v] = load(b + p * columns + v * LANES);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < V; v++) sum[r][v] += a[p * depth + r] * right[v];
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store(out + r * columns + v * LANES, sum[r][v]);
}

// out (depth, columns) += a (pixels, depth)^T b (pixels, columns)
void multiply_grad(const float* a, int pixels, int depth, const float* b, int columns, float* out) {
    for (int k = 0; k < depth; k += PIXELS) {
        int o = 0;
        for (; o + 2 * LANES <= columns; o += 2 * LANES)
            multiply_grad_block<PIXELS, 2>(a + k, pixels, depth, b + o, columns, out + k * columns + o);
        for (; o < columns; o += LANES)
            multiply_grad_block<PIXELS, 1>(a + k, pixels, depth, b + o, columns, out + k * columns + o);
    }
}

// to += from
template <class T>
void add(const T* from, T* to, int count) {
    for (int i = 0; i < count; i += LANES) store(to + i, load(to + i) + load(from + i));
}

// to += from, from = 0: sums of sums lose fewer digits than one long sum.
void move_sum(float* from, float* to, int count) {
    add(from, to, count);
    std::fill_n(from, count, 0.0f);
}

// Calls finish(part, number of the first pixel, filtered pixels) for each row of the spatial stage's output. Every part
// takes whole runs of `rows_at_a_time`. A filter sees the `group` channels of its group: spatial is (in, group, TAPS)
// or, with a tap_step of `group`, (in, TAPS, group), which is channels_last.
template <class T, class Finish>
void filter_images(
    const T* x, const float* spatial, int group, int tap_step, const Shape& s, int rows_at_a_time, int threads,
    Finish finish
) {
    const Buffer taps = transposed(spatial, s.in, group * TAPS);
    const std::int64_t row = s.width * s.in, out_rows = (std::int64_t)s.batch * s.out_height();
    in_parts(out_rows / rows_at_a_time, threads, [&](int part, std::int64_t first, std::int64_t end) {
        Window window(s.width, s.in);
        Buffer filtered(s.out_width() * s.in);
        const float* rows[3];
        int next = 0;  // row of the image to enter the window
        for (std::int64_t at = first * rows_at_a_time; at < end * rows_at_a_time; at++) {
            const T* image = x + at / s.out_height() * s.height * row;
            const int i = at % s.out_height() * s.stride;
            if (i == 0 || at == first * rows_at_a_time) next = std::max(0, i - 1);
            for (; next < std::min(i + 2, s.height); next++) copy(image + next * row, window.pixels(next), row);
            window.around(i, s.height, rows);
            float* to = filtered.data();
            group == 1 ? filter_row(rows, taps.data(), s.out_width(), s.in, s.stride, to)
                       : filter_groups(rows, taps.data(), group, tap_step, s.out_width(), s.in, s.stride, to);
            finish(part, at * s.out_width(), to);
        }
    });
}

// y = pointwise(spatial(x)), where the spatial stage is depthwise; returns the moments of y.
template <class T>
Moments conv(const T* x, const float* spatial, const float* pointwise, T* y, const Shape& s, int threads) {
    const Buffer mixing = transposed(pointwise, s.out, s.in);
    std::vector<MomentsOfPixels> parts(threads, MomentsOfPixels(s.out));
    const int whole = s.out_height();
    filter_images(x, spatial, 1, 1, s, whole, threads, [&](int part, std::int64_t pixel, const float* filtered) {
        T* row = y + pixel * s.out;
        multiply(filtered, s.out_width(), s.in, mixing.data(), s.out, row);
        parts[part].add(row, s.out_width());
    });
    return total(parts);
}

// z = relu(norm(pointwise(spatial(x)))) + residual, which may be null, with statistics that are known beforehand.
template <class T>
void conv_norm_relu(
    const T* x, const float* spatial, int group, int tap_step, const float* pointwise, const T* residual,
    const Coefficients& by, T* z, const Shape& s, int threads
) {
    const Buffer mixing = transposed(pointwise, s.out, s.in);
    threads = std::min<std::int64_t>(threads, 1 + s.out_pixels() * s.in * (TAPS * group + s.out) / WORTH_A_THREAD);
    std::vector<Buffer> rows(threads, Buffer(s.out_width() * s.out));
    filter_images(x, spatial, group, tap_step, s, 1, threads, [&](int part, std::int64_t pixel, const float* filtered) {
        const std::int64_t at = pixel * s.out;
        float* y = rows[part].data();
        multiply(filtered, s.out_width(), s.in, mixing.data(), s.out, y);
        norm_relu_row(y, residual ? residual + at : nullptr, by, z + at, s.out_width(), s.out);
    });
}

// From the gradient of relu(norm(y)), and of x along its other ways, which may be null. The output of the spatial stage
// is computed again: cheaper than to have kept it. grad_spatial may be null.
template <class T>
void conv_grad(
    const T* grad, const T* grad_skip, const T* y, const Coefficients& by, const T* x, const float* spatial,
    const float* pointwise, T* grad_x, float* grad_spatial, float* grad_pointwise, const Shape& s, int threads
) {
    const Buffer taps = transposed(spatial, s.in, TAPS);
    Buffer flipped(TAPS * s.in);  // what leads back through a filter is the filter turned by 180 degrees
    for (int t = 0; t < TAPS; t++) copy(&taps[t * s.in], &flipped[(TAPS - 1 - t) * s.in], s.in);
    const std::int64_t row = s.width * s.in, out_row = s.out_width() * s.out;
    std::vector<Buffer> tap_sums(threads), mixing_sums(threads);
    in_parts(s.batch, threads, [&](int part, std::int64_t n, std::int64_t end) {
        Window window(s.width, s.in), grads(s.width, s.in);  // of x, and of the spatial stage's gradient
        Buffer filtered(s.out_width() * s.in), grad_filtered(filtered), grad_y(out_row);
        Buffer tap_sum(TAPS * s.in), mixing_sum(s.in * s.out);  // of an image
        Buffer all_taps(TAPS * s.in), all_mixing(s.in * s.out);
        const float* rows[3];
        for (; n < end; n++) {
            const T* image = x + n * s.height * row;
            T* grad_image = grad_x + n * s.height * row;
            std::int64_t at = n * s.out_height() * out_row;
            copy(image, window.pixels(0), row);
            for (int i = 0; i <= s.height; i++) {
                if (i + 1 < s.height) copy(image + (i + 1) * row, window.pixels(i + 1), row);
                if (i < s.height && s.stride > 1) std::fill_n(grads.pixels(i), row, 0.0f);
                if (i < s.height && i % s.stride == 0) {
                    norm_relu_grad_row(grad + at, y + at, by, grad_y.data(), s.out_width(), s.out);
                    at += out_row;
                    window.around(i, s.height, rows);
                    filter_row(rows, taps.data(), s.out_width(), s.in, s.stride, filtered.data());
                    multiply_grad(filtered.data(), s.out_width(), s.in, grad_y.data(), s.out, mixing_sum.data());
                    float* to = s.stride == 1 ? grads.pixels(i) : grad_filtered.data();
                    multiply(grad_y.data(), s.out_width(), s.out, pointwise, s.in, to);
                    for (int j = 0; j < s.out_width() && s.stride > 1; j++)
                        copy(&grad_filtered[j * s.in], grads.pixels(i) + j * s.stride * s.in, s.in);
                    if (grad_spatial)
                        filter_row_grad(rows, grads.pixels(i), s.out_width(), s.in, s.stride, tap_sum.data());
                }
                if (i > 0) {  // now the gradients of the three rows around i - 1 are there
                    grads.around(i - 1, s.height, rows);
                    T* to = grad_image + (i - 1) * row;
                    filter_row(rows, flipped.data(), s.width, s.in, 1, to);
                    if (grad_skip) add(grad_skip + (to - grad_x), to, row);
                }
            }
            move_sum(tap_sum.data(), all_taps.data(), TAPS * s.in);
            move_sum(mixing_sum.data(), all_mixing.data(), s.in * s.out);
        }
        tap_sums[part] = all_taps;
        mixing_sums[part] = all_mixing;
    });
    for (int part = 0; part < threads; part++) {
        for (int c = 0; c < s.in; c++) {
            for (int o = 0; o < s.out; o++) grad_pointwise[o * s.in + c] += mixing_sums[part][c * s.out + o];
            for (int t = 0; t < TAPS && grad_spatial; t++) grad_spatial[c * TAPS + t] += tap_sums[part][t * s.in + c];
        }
    }
}

}  // namespace

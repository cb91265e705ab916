// relu(norm(x)) + residual and its gradients, with the statistics of BatchNorm.
#pragma once

#include <cmath>

#include "vector.h"

namespace {

// Mean and sum of squared deviations of each channel, merged from parts (Chan, Golub and LeVeque, 1979).
struct Moments {
    double count = 0;
    std::vector<double> mean, deviations;

    explicit Moments(int channels) : mean(channels), deviations(channels) {}

    void add(const Moments& other) {
        if (other.count == 0) return;
        const double share = other.count / (count + other.count);
        for (std::size_t c = 0; c < mean.size(); c++) {
            const double distance = other.mean[c] - mean[c];
            mean[c] += distance * share;
            deviations[c] += other.deviations[c] + distance * distance * count * share;
        }
        count += other.count;
    }
};

// Gathers the moments of pixels that come in runs. The sums, of distances to the first pixel, are double: in float32, a
// pixel that is far from the others would cost digits, and the first one most of all.
class MomentsOfPixels {
  public:
    explicit MomentsOfPixels(int channels)
        : channels_(channels), pivot_(channels), sum_(channels), squares_(channels) {}

    template <class T>
    void add(const T* pixels, int count) {
        constexpr int CHAINS = 2;  // independent sums hide the latency of an addition
        if (count_ == 0) copy(pixels, pivot_.data(), channels_);
        for (int c = 0; c < channels_; c += LANES) {
            Doubles pivot[2], sum[CHAINS][2] = {}, squares[CHAINS][2] = {};
            widen(load(&pivot_[c]), pivot);
            const auto take = [&](int i, int chain) {
                Doubles pixel[2];
                widen(load(pixels + (std::int64_t)i * channels_ + c), pixel);
                UNROLL for (int h = 0; h < 2; h++) {
                    const Doubles distance = pixel[h] - pivot[h];
                    sum[chain][h] += distance;
                    squares[chain][h] += distance * distance;
                }
            };
            int i = 0;
            for (; i + CHAINS <= count; i += CHAINS)
                UNROLL for (int j = 0; j < CHAINS; j++) take(i + j, j);
            if (i < count) take(i, 0);
            UNROLL for (int h = 0; h < 2; h++) {
                const int at = c + h * LANES / 2;
                add_to(&sum_[at], sum[0][h] + sum[1][h]);
                add_to(&squares_[at], squares[0][h] + squares[1][h]);
            }
        }
        count_ += count;
    }

    Moments total() const {
        Moments moments(channels_);
        moments.count = count_;
        for (int c = 0; c < channels_ && count_ > 0; c++) {
            const double mean = sum_[c] / count_;
            moments.mean[c] = pivot_[c] + mean;
            moments.deviations[c] = squares_[c] - sum_[c] * mean;
        }
        return moments;
    }

  private:
    int channels_;
    double count_ = 0;
    Buffer pivot_;
    std::vector<double> sum_, squares_;
};

Moments total(const std::vector<MomentsOfPixels>& parts) {
    Moments sum = parts[0].total();
    for (std::size_t i = 1; i < parts.size(); i++) sum.add(parts[i].total());
    return sum;
}

// Per channel, what the passes over a feature map x share; (6, channels) in memory.
//   forward:  relu(scale * x + shift)
//   backward: grad_x = scale * grad + slope * x + offset, where scale * x + shift > 0 lets grad through
struct Coefficients {
    float *mean, *inverse_std, *scale, *shift, *slope, *offset;

    Coefficients(float* data, int channels)
        : mean(data), inverse_std(data + channels), scale(data + 2 * channels), shift(data + 3 * channels),
          slope(data + 4 * channels), offset(data + 5 * channels) {}
};

struct Norm {
    const float *weight, *bias;
    float *running_mean, *running_var;
    double eps, momentum;

    // The coefficients of the forward pass, by the statistics of a batch, which the running ones take note of.
    void train(const Moments& batch, const Coefficients& to) const {
        for (std::size_t c = 0; c < batch.mean.size(); c++) {
            set(c, batch.mean[c], batch.deviations[c] / batch.count, to);
            running_mean[c] += momentum * (batch.mean[c] - running_mean[c]);
            running_var[c] += momentum * (batch.deviations[c] / (batch.count - 1) - running_var[c]);
        }
    }

    // The same by the running statistics.
    void infer(int channels, const Coefficients& to) const {
        for (int c = 0; c < channels; c++) set(c, running_mean[c], running_var[c], to);
    }

  private:
    void set(int c, double mean, double var, const Coefficients& to) const {
        to.mean[c] = mean;
        to.inverse_std[c] = 1 / std::sqrt(var + eps);
        to.scale[c] = weight[c] * to.inverse_std[c];
        to.shift[c] = bias[c] - mean * to.scale[c];
    }
};

std::int64_t blocks(std::int64_t pixels) { return (pixels + BLOCK - 1) / BLOCK; }

template <class T>
Moments moments(const T* x, std::int64_t pixels, int channels, int threads) {
    std::vector<MomentsOfPixels> parts(threads, MomentsOfPixels(channels));
    in_parts(blocks(pixels), threads, [&](int part, std::int64_t block, std::int64_t end) {
        for (; block < end; block++) {
            const std::int64_t first = block * BLOCK;
            parts[part].add(x + first * channels, std::min<std::int64_t>(BLOCK, pixels - first));
        }
    });
    return total(parts);
}

// y = relu(norm(x)) + residual, which may be null
template <class From, class T>
void norm_relu_row(const From* x, const T* residual, const Coefficients& by, T* y, int pixels, int channels) {
    for (int i = 0; i < pixels; i++) {
        for (int c = 0; c < channels; c += LANES) {
            const int at = i * channels + c;
            Vec v = load(by.scale + c) * load(x + at) + load(by.shift + c);
            v = v <= 0 ? Vec{} : v;  // NaN stays NaN
            if (residual) v += load(residual + at);
            store(y + at, v);
        }
    }
}

template <class T>
void norm_relu(
    const T* x, const T* residual, const Coefficients& by, T* y, std::int64_t pixels, int channels, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static) if (pixels > BLOCK)
    for (std::int64_t first = 0; first < pixels; first += BLOCK) {
        const std::int64_t at = first * channels;
        const int count = std::min<std::int64_t>(BLOCK, pixels - first);
        norm_relu_row(x + at, residual ? residual + at : nullptr, by, y + at, count, channels);
    }
}

inline Vec through_relu(Vec grad, Vec x, const Coefficients& by, int c) {
    return load(by.scale + c) * x + load(by.shift + c) > 0 ? grad : Vec{};
}

// The gradients of weight and bias, and the coefficients of the gradient of x.
template <class T>
void norm_relu_sums(
    const T* grad, const T* x, const Coefficients& by, float* grad_weight, float* grad_bias, std::int64_t pixels,
    int channels, int threads
) {
    using Sums = std::vector<double>;  // of the gradient, then of its product with x - mean
    std::vector<Sums> sums(threads, Sums(2 * channels));
    in_parts(blocks(pixels), threads, [&](int part, std::int64_t block, std::int64_t end) {
        Sums& mine = sums[part];
        for (; block < end; block++) {
            const std::int64_t first = block * BLOCK;
            const int count = std::min<std::int64_t>(BLOCK, pixels - first);
            for (int c = 0; c < channels; c += LANES) {
                const std::int64_t at = first * channels + c;
                const Vec mean = load(by.mean + c);
                Vec sum[2] = {}, products[2] = {};
                for (int i = 0; i < count; i++) {
                    const Vec pixel = load(x + at + i * channels);
                    const Vec g = through_relu(load(grad + at + i * channels), pixel, by, c);
                    sum[i % 2] += g;
                    products[i % 2] += g * (pixel - mean);
                }
                for (int l = 0; l < LANES; l++) {
                    mine[c + l] += sum[0][l] + sum[1][l];
                    mine[channels + c + l] += products[0][l] + products[1][l];
                }
            }
        }
    });
    for (int c = 0; c < channels; c++) {
        double sum = 0, products = 0;
        for (const Sums& part : sums) {
            sum += part[c];
            products += part[channels + c];
        }
        const double inverse_std = by.inverse_std[c];
        grad_bias[c] = sum;
        grad_weight[c] = products * inverse_std;
        by.slope[c] = -by.scale[c] * inverse_std * inverse_std * products / pixels;
        by.offset[c] = -by.scale[c] * sum / pixels - by.slope[c] * by.mean[c];
    }
}

template <class T, class To>
void norm_relu_grad_row(const T* grad, const T* x, const Coefficients& by, To* grad_x, int pixels, int channels) {
    for (int i = 0; i < pixels; i++) {
        for (int c = 0; c < channels; c += LANES) {
            const int at = i * channels + c;
            __builtin_prefetch(x + at + AHEAD_IN_MEMORY);
            __builtin_prefetch(grad + at + AHEAD_IN_MEMORY);
            const Vec pixel = load(x + at), g = through_relu(load(grad + at), pixel, by, c);
            store(grad_x + at, load(by.scale + c) * g + load(by.slope + c) * pixel + load(by.offset + c));
        }
    }
}

template <class T>
void norm_relu_grad(
    const T* grad, const T* x, const Coefficients& by, T* grad_x, std::int64_t pixels, int channels, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t first = 0; first < pixels; first += BLOCK) {
        const std::int64_t at = first * channels;
        norm_relu_grad_row(grad + at, x + at, by, grad_x + at, std::min<std::int64_t>(BLOCK, pixels - first), channels);
    }
}

}  // namespace

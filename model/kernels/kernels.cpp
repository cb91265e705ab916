// The fused kernels of a CPU, forward and backward: BatchNorm with ReLU, alone or after a cheap convolution.
//
// A CPU spends the training step waiting for memory. PyTorch's operators write every intermediate feature map out and
// read it back; these loops keep what they can in the cache: the output of the spatial stage, the normalized map before
// the ReLU, the gradients of both. Feature maps are channels_last, float32 or bfloat16, with a multiple of 16 channels;
// everything else, sums included, is float32 or double. Work is split by image into as many parts as there should be
// threads, and their partial sums are added in order, so that a result depends on their number alone.
//
// library.py compiles this file, and compute.py calls the functions below.
#include "conv.h"

// Feature maps are float32 or, if half, bfloat16. `residual` may be null. `coefficients` are kept from a forward to its
// backward pass. What ends in _infer uses the running statistics and keeps nothing.
extern "C" {

// y = relu(norm(x)) + residual
void norm_relu_forward(
    const void* x, const void* residual, const float* weight, const float* bias, float* mean, float* var, double eps,
    double momentum, void* y, float* coefficients, std::int64_t pixels, int channels, int half, int threads
) {
    const Coefficients by(coefficients, channels);
    const Norm norm{weight, bias, mean, var, eps, momentum};
    auto run = [&](const auto* x, const auto* residual, auto* y) {
        norm.train(moments(x, pixels, channels, threads), by);
        norm_relu(x, residual, by, y, pixels, channels, threads);
    };
    half ? run((const bf16*)x, (const bf16*)residual, (bf16*)y)
         : run((const float*)x, (const float*)residual, (float*)y);
}

void norm_relu_infer(
    const void* x, const void* residual, const float* weight, const float* bias, float* mean, float* var, double eps,
    void* y, std::int64_t pixels, int channels, int half, int threads
) {
    Buffer coefficients(6 * channels);
    const Coefficients by(coefficients.data(), channels);
    Norm{weight, bias, mean, var, eps, 0}.infer(channels, by);
    auto run = [&](const auto* x, const auto* residual, auto* y) {
        norm_relu(x, residual, by, y, pixels, channels, threads);
    };
    half ? run((const bf16*)x, (const bf16*)residual, (bf16*)y)
         : run((const float*)x, (const float*)residual, (float*)y);
}

void norm_relu_backward(
    const void* grad, const void* x, float* coefficients, void* grad_x, float* grad_weight, float* grad_bias,
    std::int64_t pixels, int channels, int half, int threads
) {
    const Coefficients by(coefficients, channels);
    auto run = [&](const auto* grad, const auto* x, auto* grad_x) {
        norm_relu_sums(grad, x, by, grad_weight, grad_bias, pixels, channels, threads);
        norm_relu_grad(grad, x, by, grad_x, pixels, channels, threads);
    };
    half ? run((const bf16*)grad, (const bf16*)x, (bf16*)grad_x)
         : run((const float*)grad, (const float*)x, (float*)grad_x);
}

// y = pointwise(spatial(x)), which is for the backward pass; z = relu(norm(y)) + residual
void cheap_conv_forward(
    const void* x, const float* spatial, const float* pointwise, const void* residual, const float* weight,
    const float* bias, float* mean, float* var, double eps, double momentum, void* y, void* z, float* coefficients,
    int batch, int height, int width, int in, int out, int stride, int half, int threads
) {
    const Shape shape{batch, height, width, in, out, stride};
    const Coefficients by(coefficients, out);
    const Norm norm{weight, bias, mean, var, eps, momentum};
    auto run = [&](const auto* x, const auto* residual, auto* y, auto* z) {
        norm.train(conv(x, spatial, pointwise, y, shape, threads), by);
        norm_relu(y, residual, by, z, shape.out_pixels(), shape.out, threads);
    };
    half ? run((const bf16*)x, (const bf16*)residual, (bf16*)y, (bf16*)z)
         : run((const float*)x, (const float*)residual, (float*)y, (float*)z);
}

// z = relu(norm(pointwise(spatial(x)))) + residual; the spatial stage has `group` channels a group
void cheap_conv_infer(
    const void* x, const float* spatial, const float* pointwise, const void* residual, const float* weight,
    const float* bias, float* mean, float* var, double eps, void* z, int batch, int height, int width, int in, int out,
    int stride, int group, int tap_step, int half, int threads
) {
    const Shape shape{batch, height, width, in, out, stride};
    Buffer coefficients(6 * out);
    const Coefficients by(coefficients.data(), out);
    Norm{weight, bias, mean, var, eps, 0}.infer(out, by);
    auto run = [&](const auto* x, const auto* residual, auto* z) {
        conv_norm_relu(x, spatial, group, tap_step, pointwise, residual, by, z, shape, threads);
    };
    half ? run((const bf16*)x, (const bf16*)residual, (bf16*)z)
         : run((const float*)x, (const float*)residual, (float*)z);
}

// Adds to grad_spatial, which may be null, and to grad_pointwise. grad_skip, which may be null, is added to grad_x.
void cheap_conv_backward(
    const void* grad, const void* grad_skip, const void* x, const float* spatial, const float* pointwise, const void* y,
    float* coefficients, void* grad_x, float* grad_spatial, float* grad_pointwise, float* grad_weight,
    float* grad_bias, int batch, int height, int width, int in, int out, int stride, int half, int threads
) {
    const Shape shape{batch, height, width, in, out, stride};
    const Coefficients by(coefficients, out);
    auto run = [&](const auto* grad, const auto* grad_skip, const auto* x, const auto* y, auto* grad_x) {
        norm_relu_sums(grad, y, by, grad_weight, grad_bias, shape.out_pixels(), shape.out, threads);
        conv_grad(
            grad, grad_skip, y, by, x, spatial, pointwise, grad_x, grad_spatial, grad_pointwise, shape, threads);
    };
    half ? run((const bf16*)grad, (const bf16*)grad_skip, (const bf16*)x, (const bf16*)y, (bf16*)grad_x)
         : run((const float*)grad, (const float*)grad_skip, (const float*)x, (const float*)y, (float*)grad_x);
}
}

// Convolution of images and its gradients.
#include "convolution.h"

namespace {

constexpr int64_t PIECE = 1 << 21;  // numbers in the columns of a piece
constexpr std::initializer_list<int> DTYPES = {F32, F16, BF16};

// Rows of one image's output, what they see of the input, and the columns made of it.
struct Piece {
  int64_t first, rows;       // of the output
  int64_t from, seen;        // rows of the input that exist
};

Piece piece_of(const Convolution &c, int64_t first) {
  Piece p{first, std::min(c.rows_at_once(), c.out_height - first), 0, 0};
  int64_t begin = first * c.stride_y - c.top;
  int64_t end = (first + p.rows - 1) * c.stride_y - c.top + (c.kernel_height - 1) * c.dilation_y + 1;
  p.from = std::clamp<int64_t>(begin, 0, c.height);
  p.seen = std::clamp<int64_t>(end, 0, c.height) - p.from;
  return p;
}

// Calls each(row of columns, row of the input, first and last column of the output that see the input, column it begins
// at) for every tap of the kernel and every row of a piece.
template <class F>
void for_taps(const Convolution &c, const Piece &p, F each) {
  int64_t depth = c.depth();
  for (int64_t tap = 0; tap < depth; ++tap) {
    int64_t x = tap % c.kernel_width, y = tap / c.kernel_width % c.kernel_height;
    int64_t channel = tap / (c.kernel_width * c.kernel_height), shift = x * c.dilation_x - c.left;
    int64_t begin = shift < 0 ? (-shift + c.stride_x - 1) / c.stride_x : 0;
    int64_t end = c.width - shift > 0 ? std::min(c.out_width, (c.width - shift - 1) / c.stride_x + 1) : 0;
    for (int64_t r = 0; r < p.rows; ++r) {
      int64_t row = (p.first + r) * c.stride_y - c.top + y * c.dilation_y - p.from;
      bool inside = row >= 0 && row < p.seen;
      each((tap * p.rows + r) * c.out_width, (channel * p.seen + row) * c.width, inside ? begin : 0,
           inside ? std::max(begin, end) : 0, shift);
    }
  }
}

void columns_of(const Convolution &c, const Piece &p, const float *slab, std::vector<float> &columns) {
  columns.assign(c.depth() * p.rows * c.out_width, 0);
  for_taps(c, p, [&](int64_t to, int64_t from, int64_t begin, int64_t end, int64_t shift) {
    for (int64_t j = begin; j < end; ++j) columns[to + j] = slab[from + j * c.stride_x + shift];
  });
}

// One image's channels of a group, rows of a piece, as a view.
aclTensor slab_of(const aclTensor *tensor, int64_t image, int64_t channel, int64_t channels, int64_t row, int64_t rows) {
  const Shape &s = tensor->strides;
  return view(tensor, {channels, rows, tensor->shape[3]}, {s[1], s[2], s[3]},
              tensor->offset + image * s[0] + channel * s[1] + row * s[2]);
}

}  // namespace

int64_t Convolution::rows_at_once() const {
  return std::clamp<int64_t>(PIECE / std::max<int64_t>(1, depth() * out_width), 1, out_height);
}

Convolution convolution_of(const Shape &input, const Shape &weight, const Shape &strides, const Shape &pads,
                           const Shape &dilations, int64_t groups) {
  require(input.size() == 4 && weight.size() == 4, "the Ascend host convolves images alone, not %s by %s",
          text(input).c_str(), text(weight).c_str());
  require(strides.size() == 2 && dilations.size() == 2 && (pads.size() == 2 || pads.size() == 4),
          "stride, padding or dilation has a wrong length");
  Convolution c{input[0], input[1], input[2], input[3], weight[0], weight[2], weight[3], 0, 0, strides[0], strides[1],
                pads[0], pads[pads.size() == 4 ? 1 : 0], pads[pads.size() == 4 ? 2 : 1], pads.back(), dilations[0],
                dilations[1], groups};
  require(groups >= 1 && groups <= 65535, "%ld groups; CANN takes 1 to 65535", groups);
  require(weight[1] * groups == c.channels, "%ld groups of %ld channels for an input of %ld", groups, weight[1],
          c.channels);
  require(c.filters % groups == 0, "%ld filters in %ld groups", c.filters, groups);
  for (int64_t stride : strides) require(stride >= 1 && stride <= 63, "a stride of %ld; CANN takes 1 to 63", stride);
  for (int64_t pad : pads) require(pad >= 0 && pad <= 255, "a padding of %ld; CANN takes 0 to 255", pad);
  for (int64_t step : dilations) require(step >= 1 && step <= 255, "a dilation of %ld; CANN takes 1 to 255", step);
  for (const Shape &shape : {input, weight})
    for (int64_t side : shape) require(side <= 1000000, "a side of %ld; CANN takes 1000000", side);
  require(c.kernel_height >= 1 && c.kernel_height <= 511 && c.kernel_width >= 1 && c.kernel_width <= 511,
          "a kernel of %ld x %ld; CANN takes 1 to 511", c.kernel_height, c.kernel_width);
  int64_t high = c.height + c.top + c.bottom - c.dilation_y * (c.kernel_height - 1) - 1;
  int64_t wide = c.width + c.left + c.right - c.dilation_x * (c.kernel_width - 1) - 1;
  require(high >= 0 && wide >= 0, "the kernel is larger than the padded input");
  c.out_height = high / c.stride_y + 1;
  c.out_width = wide / c.stride_x + 1;
  return c;
}

void convolve(const Convolution &c, const aclTensor *x, const aclTensor *weight, const aclTensor *bias, aclTensor *out,
              int dtype, int8_t math) {
  std::vector<float> kernel = read<float>(weight), shift;
  narrow(kernel, dtype, math);
  if (bias) shift = read<float>(bias);
  int64_t pieces = (c.out_height + c.rows_at_once() - 1) / c.rows_at_once(), depth = c.depth();
  int64_t own = c.channels / c.groups, filters = c.filters / c.groups;
  in_parallel(c.images * c.groups * pieces, filters * depth * c.rows_at_once() * c.out_width,
              [&](int64_t begin, int64_t end) {
    std::vector<float> columns, result;
    for (int64_t i = begin; i < end; ++i) {
      int64_t image = i / pieces / c.groups, group = i / pieces % c.groups;
      Piece p = piece_of(c, i % pieces * c.rows_at_once());
      aclTensor seen = slab_of(x, image, group * own, own, p.from, p.seen);
      std::vector<float> slab = read<float>(&seen);
      narrow(slab, dtype, math);
      columns_of(c, p, slab.data(), columns);
      int64_t pixels = p.rows * c.out_width;
      result.resize(filters * pixels);
      multiply(false, false, filters, pixels, depth, 1.0f, &kernel[group * filters * depth], columns.data(), 0.0f,
               result.data());
      if (bias)
        for (int64_t j = 0; j < filters * pixels; ++j) result[j] += shift[group * filters + j / pixels];
      aclTensor to = slab_of(out, image, group * filters, filters, p.first, p.rows);
      write(&to, result);
    }
  });
}

void convolve_back(const Convolution &c, const aclTensor *dy, const aclTensor *x, const aclTensor *weight, int dtype,
                   int8_t math, std::vector<float> *dx, std::vector<float> *dweight) {
  int64_t depth = c.depth(), own = c.channels / c.groups, filters = c.filters / c.groups;
  std::vector<float> kernel;
  if (dx) {
    kernel = read<float>(weight);
    narrow(kernel, dtype, math);
    dx->assign(c.images * c.channels * c.height * c.width, 0);
  }
  if (dweight) dweight->assign(c.filters * depth, 0);
  // A group's gradients are its own, so that groups share the cores.
  in_parallel(c.groups, c.images * filters * depth * c.out_height * c.out_width, [&](int64_t begin, int64_t end) {
    std::vector<float> columns;
    for (int64_t group = begin; group < end; ++group)
      for (int64_t image = 0; image < c.images; ++image)
        for (int64_t first = 0; first < c.out_height; first += c.rows_at_once()) {
          Piece p = piece_of(c, first);
          aclTensor given = slab_of(dy, image, group * filters, filters, p.first, p.rows);
          std::vector<float> grad = read<float>(&given);
          narrow(grad, dtype, math);
          int64_t pixels = p.rows * c.out_width;
          if (dweight) {
            aclTensor seen = slab_of(x, image, group * own, own, p.from, p.seen);
            std::vector<float> slab = read<float>(&seen);
            narrow(slab, dtype, math);
            columns_of(c, p, slab.data(), columns);
            multiply(false, true, filters, depth, pixels, 1.0f, grad.data(), columns.data(), 1.0f,
                     &(*dweight)[group * filters * depth]);
          }
          if (!dx) continue;
          columns.resize(depth * pixels);
          multiply(true, false, depth, pixels, filters, 1.0f, &kernel[group * filters * depth], grad.data(), 0.0f,
                   columns.data());
          std::vector<float> slab(own * p.seen * c.width);
          for_taps(c, p, [&](int64_t from, int64_t to, int64_t start, int64_t stop, int64_t shift) {
            for (int64_t j = start; j < stop; ++j) slab[to + j * c.stride_x + shift] += columns[from + j];
          });
          for (int64_t channel = 0; channel < own; ++channel) {
            float *to = &(*dx)[((image * c.channels + group * own + channel) * c.height + p.from) * c.width];
            for (int64_t j = 0; j < p.seen * c.width; ++j) to[j] += slab[channel * p.seen * c.width + j];
          }
        }
  });
}

KERNEL(aclnnConvolution, const aclTensor *x, const aclTensor *weight, const aclTensor *bias, const aclIntArray *stride,
       const aclIntArray *padding, const aclIntArray *dilation, bool transposed, const aclIntArray *, int64_t groups,
       aclTensor *out, int8_t math) {
  PLAN {
    require(!transposed, "the Ascend host has no transposed convolution");
    for (const aclTensor *tensor : {x, weight}) require_dtype(tensor, "input or weight", DTYPES);
    require_cube_math(math);
    int dtype = cube_dtype(x, weight);
    // float32 with KEEP_DTYPE is not supported by the page, but is by CANN's own checks and by everyone's practice.
    require(math != USE_FP16 || dtype != BF16, "cubeMathType 2 for bfloat16");
    require(stride && padding && dilation, "stride, padding or dilation is missing");
    Convolution c = convolution_of(x->shape, weight->shape, stride->values, padding->values, dilation->values, groups);
    require_dtype(out, "output", DTYPES);
    require_shape(out, "output", {c.images, c.filters, c.out_height, c.out_width});
    if (bias) {
      require_same_dtype(bias, weight, "bias and weight");
      require_shape(bias, "bias", {c.filters});
    }
    return [=] { convolve(c, x, weight, bias, out, dtype, math); };
  };
}

KERNEL(aclnnConvolutionBackward, const aclTensor *dy, const aclTensor *x, const aclTensor *weight,
       const aclIntArray *bias_sizes, const aclIntArray *stride, const aclIntArray *padding, const aclIntArray *dilation,
       bool transposed, const aclIntArray *, int groups, const aclBoolArray *mask, int8_t math, aclTensor *dx,
       aclTensor *dweight, aclTensor *dbias) {
  PLAN {
    require(!transposed, "the Ascend host has no transposed convolution");
    for (const aclTensor *tensor : {dy, x, weight}) {
      require_dtype(tensor, "gradOutput, input or weight", DTYPES);
      require_same_dtype(dy, tensor, "gradOutput, input and weight");
    }
    require_cube_math(math);
    require(stride && padding && dilation, "stride, padding or dilation is missing");
    Convolution c = convolution_of(x->shape, weight->shape, stride->values, padding->values, dilation->values, groups);
    require_shape(dy, "gradOutput", {c.images, c.filters, c.out_height, c.out_width});
    require(mask && mask->values.size() == 3, "outputMask must have 3 values");
    std::vector<uint8_t> wanted = mask->values;
    if (wanted[0]) require_shape(dx, "gradInput", x->shape);
    if (wanted[1]) require_shape(dweight, "gradWeight", weight->shape);
    if (wanted[2]) {
      require(bias_sizes && bias_sizes->values == Shape{c.filters}, "biasSizes is not the number of filters");
      require_shape(dbias, "gradBias", {c.filters});
    }
    return [=] {
      std::vector<float> input, kernel;
      convolve_back(c, dy, x, weight, dy->dtype, math, wanted[0] ? &input : nullptr, wanted[1] ? &kernel : nullptr);
      std::vector<double> sums(c.filters);
      if (wanted[2]) {
        std::vector<float> grad = read<float>(dy);
        int64_t pixels = c.out_height * c.out_width;
        for (size_t i = 0; i < grad.size(); ++i) sums[i / pixels % c.filters] += grad[i];
      }
      if (wanted[0]) write(dx, input);
      if (wanted[1]) write(dweight, kernel);
      if (wanted[2]) write(dbias, sums);
    };
  };
}

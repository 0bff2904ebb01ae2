// Nearest neighbours: an image made larger or smaller, and its gradient.
#include "arrays.h"

namespace {

// Row or column of the input behind each of the output.
std::vector<int64_t> sources(int64_t from, int64_t to) {
  std::vector<int64_t> result(to);
  float scale = static_cast<float>(from) / static_cast<float>(to);
  for (int64_t i = 0; i < to; ++i)
    result[i] = std::min<int64_t>(static_cast<int64_t>(std::floor(static_cast<float>(i) * scale)), from - 1);
  return result;
}

void require_images(const aclTensor *small, const aclTensor *large, const Shape &size) {
  require_rank(small, "self", 4, 4);
  require(size.size() == 2 && size[0] > 0 && size[1] > 0, "outputSize is %s", text(size).c_str());
  require_shape(large, "the larger image", {small->shape[0], small->shape[1], size[0], size[1]});
  require_same_dtype(small, large, "both images");
  for (const aclTensor *tensor : {small, large})
    for (int64_t side : tensor->shape) require(side >= 1 && side <= 1 << 20, "a side of %ld; CANN takes 1048576", side);
}

}  // namespace

KERNEL(aclnnUpsampleNearest2d, const aclTensor *x, const aclIntArray *size, aclTensor *out) {
  PLAN {
    require_dtype(x, "self", {F32, BF16, F16, F64, U8});
    require(size && out, "outputSize or out is missing");
    require_images(x, out, size->values);
    int64_t height = x->shape[2], width = x->shape[3];
    std::vector<int64_t> rows = sources(height, out->shape[2]), columns = sources(width, out->shape[3]);
    return [=] {
      aclTensor whole = view(out, out->shape, packed_strides(out->shape), 0);
      std::vector<char> packed(elements(out) * item_size(out->dtype)), items(elements(x) * item_size(x->dtype));
      aclTensor source = view(x, x->shape, packed_strides(x->shape), 0);
      source.data = items.data();
      whole.data = packed.data();
      copy_items(x, &source);
      size_t step = item_size(x->dtype), at = 0;
      int64_t planes = x->shape[0] * x->shape[1];
      for (int64_t plane = 0; plane < planes; ++plane)
        for (int64_t row : rows)
          for (int64_t column : columns)
            std::memcpy(&packed[step * at++], &items[step * ((plane * height + row) * width + column)], step);
      copy_items(&whole, out);
    };
  };
}

KERNEL(aclnnUpsampleNearest2dBackward, const aclTensor *dy, const aclIntArray *size, const aclIntArray *input, double,
       double, aclTensor *dx) {
  PLAN {
    require_dtype(dy, "gradOut", {F32, F16, BF16});
    require(size && input && dx, "outputSize, inputSize or gradInput is missing");
    require_shape(dx, "gradInput", input->values);
    require_images(dx, dy, size->values);
    std::vector<int64_t> rows = sources(dx->shape[2], dy->shape[2]), columns = sources(dx->shape[3], dy->shape[3]);
    return [=] {
      std::vector<float> grad = read<float>(dy);
      std::vector<double> sums(elements(dx));
      int64_t planes = dx->shape[0] * dx->shape[1], height = dx->shape[2], width = dx->shape[3], at = 0;
      for (int64_t plane = 0; plane < planes; ++plane)
        for (int64_t row : rows)
          for (int64_t column : columns) sums[(plane * height + row) * width + column] += grad[at++];
      write(dx, sums);
    };
  };
}

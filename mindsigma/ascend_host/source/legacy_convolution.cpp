// Conv2D of the older interface and its gradients: the attributes are lists of four in the order of the layout, NCHW.
#include "convolution.h"
#include "legacy.h"

namespace {

const Shape &list(const Attributes &attributes, const char *name) {
  auto found = attributes.lists.find(name);
  require(found != attributes.lists.end(), "the attribute %s is missing", name);
  return found->second;
}

Convolution described(const Shape &input, const Shape &weight, const Attributes &attributes) {
  auto layout = attributes.words.find("data_format");
  require(layout == attributes.words.end() || layout->second == "NCHW", "the Ascend host convolves NCHW alone, not %s",
          layout == attributes.words.end() ? "" : layout->second.c_str());
  const Shape &strides = list(attributes, "strides"), &dilations = list(attributes, "dilations");
  require(strides.size() == 4 && dilations.size() == 4, "strides or dilations are not four numbers");
  return convolution_of(input, weight, {strides[2], strides[3]}, list(attributes, "pads"), {dilations[2], dilations[3]},
                        attributes.number("groups", 1));
}

void require_tensors(const std::vector<aclTensor> &tensors, size_t least, const char *what) {
  require(tensors.size() >= least, "%zu %s", tensors.size(), what);
  for (const aclTensor &tensor : tensors)
    if (tensor.shape.size() == 4) require_dtype(&tensor, what, {F16, BF16, F32});
}

}  // namespace

LEGACY(Conv2D) {
  require_tensors(inputs, 2, "inputs");
  Convolution c = described(inputs[0].shape, inputs[1].shape, attributes);
  require_shape(&outputs[0], "y", {c.images, c.filters, c.out_height, c.out_width});
  const aclTensor *bias = inputs.size() > 2 && elements(&inputs[2]) ? &inputs[2] : nullptr;
  convolve(c, &inputs[0], &inputs[1], bias, &outputs[0], cube_dtype(&inputs[0], &inputs[1]), KEEP_DTYPE);
}

// Shape of the input, filter, gradient of the output.
LEGACY(Conv2DBackpropInput) {
  require_tensors(inputs, 3, "inputs");
  Convolution c = described(outputs[0].shape, inputs[1].shape, attributes);
  require_shape(&inputs[2], "out_backprop", {c.images, c.filters, c.out_height, c.out_width});
  std::vector<float> gradient;
  convolve_back(c, &inputs[2], nullptr, &inputs[1], inputs[2].dtype, KEEP_DTYPE, &gradient, nullptr);
  write(&outputs[0], gradient);
}

// Input, shape of the filter, gradient of the output.
LEGACY(Conv2DBackpropFilter) {
  require_tensors(inputs, 3, "inputs");
  Convolution c = described(inputs[0].shape, outputs[0].shape, attributes);
  require_shape(&inputs[2], "out_backprop", {c.images, c.filters, c.out_height, c.out_width});
  std::vector<float> gradient;
  convolve_back(c, &inputs[2], &inputs[0], nullptr, inputs[2].dtype, KEEP_DTYPE, nullptr, &gradient);
  write(&outputs[0], gradient);
}

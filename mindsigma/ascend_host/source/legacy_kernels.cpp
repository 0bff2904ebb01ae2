// Operators that MindSpore still runs by the older interface: inputs and attributes as ge's operators name them.
#include "legacy.h"
#include "mapping.h"

namespace {

Shape numbers(const aclTensor &tensor) { return read<int64_t>(&tensor); }

void require_count(const std::vector<aclTensor> &tensors, size_t count, const char *what) {
  require(tensors.size() == count, "%zu %s; the operator has %zu", tensors.size(), what, count);
}

// What StridedSlice takes of a tensor: the part, in the tensor's own memory.
aclTensor strided(const aclTensor &x, const Shape &begin, const Shape &end, const Shape &steps, const Attributes &masks) {
  int64_t shrunk = masks.number("shrink_axis_mask", 0), added = masks.number("new_axis_mask", 0);
  int64_t open_begin = masks.number("begin_mask", 0), open_end = masks.number("end_mask", 0);
  int64_t ellipsis = masks.number("ellipsis_mask", 0);
  aclTensor part = x;
  part.shape.clear();
  part.strides.clear();
  size_t named = 0;  // entries that stand for a dimension of x
  for (size_t i = 0; i < begin.size(); ++i) named += !(added >> i & 1) && !(ellipsis >> i & 1);
  require(named <= x.shape.size(), "%zu entries for %zu dimensions", named, x.shape.size());
  size_t axis = 0;
  auto keep = [&] {
    part.shape.push_back(x.shape[axis]);
    part.strides.push_back(x.strides[axis++]);
  };
  for (size_t i = 0; i < begin.size(); ++i) {
    if (ellipsis >> i & 1) {
      for (size_t skipped = x.shape.size() - named; skipped > 0; --skipped) keep();
      continue;
    }
    if (added >> i & 1) {
      part.shape.push_back(1);
      part.strides.push_back(0);
      continue;
    }
    int64_t side = x.shape[axis], step = steps[i];
    require(step != 0, "a stride is 0");
    int64_t first = begin[i] < 0 ? begin[i] + side : begin[i], last = end[i] < 0 ? end[i] + side : end[i];
    if (shrunk >> i & 1) {
      require(first >= 0 && first < side, "place %ld of %ld", first, side);
      part.offset += first * x.strides[axis++];
      continue;
    }
    int64_t low = step > 0 ? 0 : -1, high = step > 0 ? side : side - 1;
    first = open_begin >> i & 1 ? (step > 0 ? low : high) : std::min(std::max(first, low), high);
    last = open_end >> i & 1 ? (step > 0 ? high : low) : std::min(std::max(last, low), high);
    part.shape.push_back(std::max<int64_t>((last - first + step - (step > 0 ? 1 : -1)) / step, 0));
    part.offset += first * x.strides[axis];
    part.strides.push_back(x.strides[axis++] * step);
  }
  while (axis < x.shape.size()) keep();
  return part;
}

void zero(aclTensor &tensor) {
  require(contiguous(&tensor), "an output is not packed");
  std::memset(tensor.data + tensor.offset * item_size(tensor.dtype), 0, elements(&tensor) * item_size(tensor.dtype));
}

// Parts of a dimension, one an output.
void split(const aclTensor &x, int64_t dim, std::vector<aclTensor> &outputs) {
  int64_t axis = axis_of(dim, x.shape.size(), "split_dim"), start = 0;
  for (aclTensor &out : outputs) {
    aclTensor part = x;
    part.offset += start * x.strides[axis];
    part.shape[axis] = out.shape[axis];
    start += out.shape[axis];
    require_shape(&out, "a part", part.shape);
    copy_items(&part, &out);
  }
  require(start == x.shape[axis], "parts of %ld in all for a side of %ld", start, x.shape[axis]);
}

// A tensor without a dimension, at a place of it.
aclTensor at(const aclTensor &tensor, int64_t axis, int64_t place) {
  aclTensor seen = tensor;
  seen.offset += place * tensor.strides[axis];
  seen.shape.erase(seen.shape.begin() + axis);
  seen.strides.erase(seen.strides.begin() + axis);
  return seen;
}

void fill(const aclTensor &value, aclTensor &out) {
  aclTensor number = view(&value, Shape(out.shape.size(), 1), Shape(out.shape.size(), 0), value.offset);
  require(elements(&value) == 1, "a value of shape %s", text(value.shape).c_str());
  require_same_dtype(&value, &out, "value and out");
  copy_items(&number, &out);
}

// Rows of x along an axis, chosen by indices; refuses what lies beyond.
void gather(const aclTensor &x, const aclTensor &indices, int64_t dim, aclTensor &out) {
  require_dtype(&indices, "indices", INDICES);
  int64_t axis = axis_of(dim, x.shape.size(), "axis"), side = x.shape[axis];
  Shape shape(x.shape.begin(), x.shape.begin() + axis), rows = indices.shape, rest(x.shape.begin() + axis + 1, x.shape.end());
  shape.insert(shape.end(), rows.begin(), rows.end());
  shape.insert(shape.end(), rest.begin(), rest.end());
  require_shape(&out, "out", shape);
  // The indices as one dimension.
  Shape flat(x.shape);
  flat[axis] = elements(&indices);
  aclTensor target = view(&out, flat, packed_strides(flat), out.offset);
  std::vector<int64_t> places = read<int64_t>(&indices);
  for (size_t i = 0; i < places.size(); ++i) {
    int64_t place = places[i] < 0 ? places[i] + side : places[i];
    require(place >= 0 && place < side, "index %ld of %ld rows", places[i], side);
    aclTensor from = at(x, axis, place), to = at(target, axis, i);
    copy_items(&from, &to);
  }
}

}  // namespace

LEGACY(StridedSlice) {
  require_count(inputs, 4, "inputs");
  aclTensor part = strided(inputs[0], numbers(inputs[1]), numbers(inputs[2]), numbers(inputs[3]), attributes);
  require_shape(&outputs[0], "y", part.shape);
  copy_items(&part, &outputs[0]);
}

// Inputs: the shape of x, begin, end, strides, the gradient of the part.
LEGACY(StridedSliceGrad) {
  require_count(inputs, 5, "inputs");
  require_shape(&outputs[0], "dx", numbers(inputs[0]));
  aclTensor part = strided(outputs[0], numbers(inputs[1]), numbers(inputs[2]), numbers(inputs[3]), attributes);
  require_shape(&inputs[4], "dy", part.shape);
  zero(outputs[0]);
  copy_items(&inputs[4], &part);
}

LEGACY(Slice) {
  require_count(inputs, 3, "inputs");
  Shape start = numbers(inputs[1]), size = numbers(inputs[2]);
  aclTensor part = inputs[0];
  for (size_t i = 0; i < start.size(); ++i) {
    part.offset += start[i] * part.strides[i];
    part.shape[i] = size[i] < 0 ? part.shape[i] - start[i] : size[i];
    require(start[i] >= 0 && start[i] + part.shape[i] <= inputs[0].shape[i], "%ld from %ld on, of %ld", part.shape[i],
            start[i], inputs[0].shape[i]);
  }
  require_shape(&outputs[0], "y", part.shape);
  copy_items(&part, &outputs[0]);
}

LEGACY(Split) { split(inputs[1], numbers(inputs[0])[0], outputs); }
LEGACY(SplitD) { split(inputs[0], attributes.number("split_dim", 0), outputs); }
LEGACY(SplitV) { split(inputs[0], numbers(inputs[2])[0], outputs); }
LEGACY(SplitVD) { split(inputs[0], attributes.number("split_dim", 0), outputs); }

LEGACY(Unpack) {
  int64_t axis = axis_of(attributes.number("axis", 0), inputs[0].shape.size(), "axis");
  require(inputs[0].shape[axis] == static_cast<int64_t>(outputs.size()), "%zu outputs for a side of %ld", outputs.size(),
          inputs[0].shape[axis]);
  for (size_t i = 0; i < outputs.size(); ++i) {
    aclTensor from = at(inputs[0], axis, i);
    require_shape(&outputs[i], "an output", from.shape);
    copy_items(&from, &outputs[i]);
  }
}

LEGACY(Pack) {
  int64_t axis = axis_of(attributes.number("axis", 0), outputs[0].shape.size(), "axis");
  require(outputs[0].shape[axis] == static_cast<int64_t>(inputs.size()), "%zu inputs for a side of %ld", inputs.size(),
          outputs[0].shape[axis]);
  for (size_t i = 0; i < inputs.size(); ++i) {
    aclTensor to = at(outputs[0], axis, i);
    require_shape(&inputs[i], "an input", to.shape);
    copy_items(&inputs[i], &to);
  }
}

LEGACY(Addcmul) {
  require_count(inputs, 4, "inputs");
  for (aclTensor &tensor : inputs) require_dtype(&tensor, "an input", {F32, F16, BF16, I8, U8, I32, I64, F64});
  combine(&outputs[0], inputs[0].dtype, [](auto x, auto a, auto b, auto value) { return x + value * a * b; },
          &inputs[0], &inputs[1], &inputs[2], &inputs[3])();
}

// The bias lies along the channels: the second dimension, or the last one where they come last.
LEGACY(BiasAdd) {
  require_count(inputs, 2, "inputs");
  require_same_dtype(&inputs[0], &inputs[1], "x and bias");
  require_rank(&inputs[1], "bias", 1, 1);
  size_t rank = inputs[0].shape.size();
  auto layout = attributes.words.find("data_format");
  bool last = rank == 2 || layout == attributes.words.end() || layout->second == "NHWC";
  size_t axis = last ? rank - 1 : 1;
  require(inputs[0].shape[axis] == inputs[1].shape[0], "a bias of %ld for %ld channels", inputs[1].shape[0],
          inputs[0].shape[axis]);
  Shape shape(rank, 1), strides(rank, 0);
  shape[axis] = inputs[1].shape[0];
  strides[axis] = 1;
  const aclTensor x = inputs[0], bias = view(&inputs[1], shape, strides, inputs[1].offset);
  combine(&outputs[0], x.dtype, [](auto a, auto b) { return a + b; }, &x, &bias)();
}

LEGACY(Fill) { fill(inputs[1], outputs[0]); }

LEGACY(Assign) {
  require_count(inputs, 2, "inputs");
  require_same_dtype(&inputs[0], &inputs[1], "ref and value");
  require_shape(&inputs[1], "value", inputs[0].shape);
  copy_items(&inputs[1], &inputs[0]);
  if (outputs[0].data != inputs[0].data) copy_items(&inputs[0], &outputs[0]);
}

LEGACY(TensorMove) {
  require_count(inputs, 1, "inputs");
  require_same_dtype(&inputs[0], &outputs[0], "x and y");
  require_shape(&outputs[0], "y", inputs[0].shape);
  copy_items(&inputs[0], &outputs[0]);
}

LEGACY(AddN) {
  in_wide_type({outputs[0].dtype}, [&](auto zero) {
    std::vector<decltype(zero)> sum(elements(&outputs[0]));
    for (const aclTensor &tensor : inputs) {
      require_same_dtype(&tensor, &outputs[0], "the tensors");
      require_shape(&tensor, "a tensor", outputs[0].shape);
      std::vector<decltype(zero)> values = read<decltype(zero)>(&tensor);
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += values[i];
    }
    write(&outputs[0], sum);
  });
}

LEGACY(RealDiv) {
  require_count(inputs, 2, "inputs");
  require_same_dtype(&inputs[0], &inputs[1], "x1 and x2");
  const aclTensor x = inputs[0], y = inputs[1];
  combine(&outputs[0], is_float(x.dtype) ? x.dtype : F32, [](auto a, auto b) { return a / b; }, &x, &y)();
}

LEGACY(GatherV2) {
  require_count(inputs, 3, "inputs");
  require(attributes.number("batch_dims", 0) == 0, "batch_dims is %ld; this host takes 0",
          attributes.number("batch_dims", 0));
  gather(inputs[0], inputs[1], numbers(inputs[2])[0], outputs[0]);
}

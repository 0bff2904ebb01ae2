#include "places.h"

Named::Named(const aclTensor *self, const std::vector<aclTensor *> &indices) {
  std::vector<std::vector<int64_t>> numbers;  // for every named dimension, broadcast later
  std::vector<Shape> shapes;
  Shape axes;
  int64_t axis = 0;
  Shape common;
  for (const aclTensor *index : indices) {
    if (index->dtype != BOOL) {
      require(axis < int64_t(self->shape.size()), "more indices than dimensions");
      if (index->shape != Shape{0}) {
        numbers.push_back(read<int64_t>(index));
        shapes.push_back(index->shape);
        axes.push_back(axis);
        common = broadcast(common, index->shape);
      }
      ++axis;
      continue;
    }
    std::vector<int64_t> mask = read<int64_t>(index);
    size_t rank = index->shape.size(), first = numbers.size();
    for (size_t i = 0; i < rank; ++i) {
      require(axis + i < self->shape.size() && index->shape[i] == self->shape[axis + i], "a mask of %s for %s",
              text(index->shape).c_str(), text(self->shape).c_str());
      numbers.emplace_back();
      axes.push_back(axis + i);
    }
    Shape strides = packed_strides(index->shape);
    for (size_t i = 0; i < mask.size(); ++i)
      for (size_t j = 0; mask[i] && j < rank; ++j)
        numbers[first + j].push_back(int64_t(i) / strides[j] % index->shape[j]);
    Shape found{rank ? int64_t(numbers[first].size()) : 0};
    for (size_t i = 0; i < rank; ++i) shapes.push_back(found);
    common = broadcast(common, found);
    axis += rank;
  }
  bool together = true;
  for (size_t i = 1; i < axes.size(); ++i) together = together && axes[i] == axes[i - 1] + 1;
  Shape steps;  // of the dimensions taken whole; the named ones are a row of offsets
  std::vector<int64_t> row(elements(common), self->offset);
  for (size_t i = 0; i < axes.size(); ++i) {
    aclTensor index{I64, 0, shapes[i], packed_strides(shapes[i]), 0, shapes[i], reinterpret_cast<char *>(numbers[i].data())};
    std::vector<int64_t> spread = read<int64_t>(&index, common);
    for (size_t j = 0; j < row.size(); ++j)
      row[j] += checked(spread[j], self->shape[axes[i]]) * self->strides[axes[i]];
  }
  size_t place = together && !axes.empty() ? axes[0] : 0;  // of the named ones among the others
  Shape whole;
  for (size_t i = 0; i < self->shape.size(); ++i)
    if (std::find(axes.begin(), axes.end(), int64_t(i)) == axes.end()) {
      whole.push_back(self->shape[i]);
      steps.push_back(self->strides[i]);
    }
  Shape before(whole.begin(), whole.begin() + place), after(whole.begin() + place, whole.end());
  aclTensor head = view(self, before, Shape(steps.begin(), steps.begin() + place), 0);
  aclTensor tail = view(self, after, Shape(steps.begin() + place, steps.end()), 0);
  std::vector<int64_t> heads = offsets(&head, before), tails = offsets(&tail, after);
  for (int64_t a : heads)
    for (int64_t b : row)
      for (int64_t c : tails) places.push_back(a + b + c);
  shape = before;
  shape.insert(shape.end(), common.begin(), common.end());
  shape.insert(shape.end(), after.begin(), after.end());
}

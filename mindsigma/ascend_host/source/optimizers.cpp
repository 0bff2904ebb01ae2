// Optimisers that are one kernel.
#include "mapping.h"

// AdamW. The kernel counts from 0: the corrections are those of the step after the one that it is given.
KERNEL(aclnnApplyAdamWV2, aclTensor *var, aclTensor *m, aclTensor *v, aclTensor *largest, const aclTensor *grad,
       const aclTensor *step, float rate, float beta1, float beta2, float decay, float eps, bool amsgrad,
       bool maximize) {
  PLAN {
    for (const aclTensor *tensor : std::initializer_list<const aclTensor *>{var, m, v, grad}) {
      require_dtype(tensor, "a tensor", FLOATS);
      require_shape(tensor, "a tensor", var->shape);
    }
    require_rank(var, "varRef", 0, MOST_DIMENSIONS);
    require_same_dtype(var, m, "varRef and mRef");
    require_same_dtype(var, v, "varRef and vRef");
    require_dtype(step, "step", {F32, I64});
    require(elements(step) == 1, "step has %ld elements; CANN takes 1", elements(step));
    require(!amsgrad || largest, "maxGradNormOptionalRef is missing for amsgrad");
    if (largest) require_shape(largest, "maxGradNormOptionalRef", var->shape);
    return [=] {
      std::vector<float> weight = read<float>(var), mean = read<float>(m), square = read<float>(v), slope = read<float>(grad);
      std::vector<float> top = amsgrad ? read<float>(largest) : std::vector<float>();
      float count = read<float>(step)[0] + 1;
      float correction1 = 1 - std::pow(beta1, count), root2 = std::sqrt(1 - std::pow(beta2, count));
      in_parallel(weight.size(), 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          float g = maximize ? -slope[i] : slope[i];
          mean[i] += (1 - beta1) * (g - mean[i]);
          square[i] = beta2 * square[i] + (1 - beta2) * g * g;
          if (amsgrad) top[i] = std::max(top[i], square[i]);
          float below = std::sqrt(amsgrad ? top[i] : square[i]) / root2 + eps;
          weight[i] = weight[i] * (1 - rate * decay) - rate / correction1 * mean[i] / below;
        }
      });
      write(var, weight);
      write(m, mean);
      write(v, square);
      if (amsgrad) write(largest, top);
    };
  };
}

// Gradients of FlashAttentionScore, from the statistics that it kept: the weights are computed once more.
#include "attention.h"

KERNEL(aclnnFlashAttentionScoreGrad, const aclTensor *query, const aclTensor *key, const aclTensor *value,
       const aclTensor *dy, const aclTensor *shift, const aclTensor *drop, const aclTensor *padding,
       const aclTensor *mask, const aclTensor *top_in, const aclTensor *sum_in, const aclTensor *, const aclTensor *y,
       const aclIntArray *prefix, double scale, double keep, int64_t before, int64_t after, int64_t heads, char *layout,
       int64_t precise, int64_t mode, aclTensor *dq, aclTensor *dk, aclTensor *dv, aclTensor *) {
  PLAN {
    Attention a = attention_of({query, key, value, shift, drop, padding, mask, prefix, scale, keep, before, after, heads,
                                layout, precise, mode});
    Shape out = layout_shape(a.layout, a.batch, a.heads, a.queries, a.value_width);
    for (const aclTensor *tensor : {dy, y}) {
      require(tensor, "dy or attentionIn is missing");
      require_same_dtype(query, tensor, "query, dy and attentionIn");
      require_shape(tensor, "dy or attentionIn", out);
    }
    for (const aclTensor *tensor : {top_in, sum_in}) {
      require_dtype(tensor, "softmaxMax or softmaxSum", {F32});
      require_shape(tensor, "softmaxMax or softmaxSum", {a.batch, a.heads, a.queries, 8});
    }
    const aclTensor *inputs[] = {query, key, value}, *outputs[] = {dq, dk, dv};
    for (int i = 0; i < 3; ++i) {
      require(outputs[i], "an output is missing");
      require_same_dtype(query, outputs[i], "query and the gradients");
      require_shape(outputs[i], "a gradient", inputs[i]->shape);
    }
    return [=] {
      int64_t group = a.heads / a.key_heads;
      // Everything of one head of the key at once, so that nobody else adds to its gradient.
      in_parallel(a.batch * a.key_heads, group * a.queries * a.keys * a.width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          int64_t image = i / a.key_heads, key_head = i % a.key_heads;
          aclTensor k_head = head_of(key, a.layout, a.key_heads, image, key_head);
          aclTensor v_head = head_of(value, a.layout, a.key_heads, image, key_head);
          std::vector<float> k = read<float>(&k_head), v = read<float>(&v_head);
          std::vector<float> k_grad(k.size()), v_grad(v.size()), weights, slopes;
          for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
            aclTensor q_head = head_of(query, a.layout, a.heads, image, head), y_head = head_of(y, a.layout, a.heads, image, head);
            aclTensor dy_head = head_of(dy, a.layout, a.heads, image, head), dq_head = head_of(dq, a.layout, a.heads, image, head);
            std::vector<float> q = read<float>(&q_head), grad = read<float>(&dy_head), result = read<float>(&y_head);
            std::vector<float> q_grad(q.size());
            auto statistics = [&](const aclTensor *from) {
              const Shape &s = from->strides;
              aclTensor column = view(from, {a.queries}, {s[2]}, from->offset + image * s[0] + head * s[1]);
              return read<float>(&column);
            };
            std::vector<float> tops = statistics(top_in), sums = statistics(sum_in);
            for (int64_t first = 0; first < a.queries; first += a.block()) {
              int64_t count = std::min(a.block(), a.queries - first);
              const float *dy_rows = &grad[first * a.value_width];
              scores(a, image, head, first, count, q.data(), k.data(), weights);
              slopes.resize(weights.size());
              multiply(false, true, count, a.keys, a.value_width, 1.0f, dy_rows, v.data(), 0.0f, slopes.data());
              for (int64_t r = 0; r < count; ++r) {
                float *row = &weights[r * a.keys], *slope = &slopes[r * a.keys], top = tops[first + r];
                exponentials(row, a.keys, top);
                bool empty = (a.drop_empty_rows && top == LOWEST) || !sums[first + r];
                float factor = empty ? 0.0f : 1.0f / sums[first + r];
                double mean = 0;
                for (int64_t j = 0; j < a.value_width; ++j)
                  mean += double(dy_rows[r * a.value_width + j]) * result[(first + r) * a.value_width + j];
                for (int64_t j = 0; j < a.keys; ++j) {
                  row[j] *= factor;
                  slope[j] = row[j] * (slope[j] - static_cast<float>(mean));
                }
              }
              multiply(true, false, a.keys, a.value_width, count, 1.0f, weights.data(), dy_rows, 1.0f, v_grad.data());
              multiply(false, false, count, a.width, a.keys, a.scale, slopes.data(), k.data(), 0.0f,
                       &q_grad[first * a.width]);
              multiply(true, false, a.keys, a.width, count, a.scale, slopes.data(), &q[first * a.width], 1.0f,
                       k_grad.data());
            }
            write(&dq_head, q_grad);
          }
          aclTensor dk_head = head_of(dk, a.layout, a.key_heads, image, key_head);
          aclTensor dv_head = head_of(dv, a.layout, a.key_heads, image, key_head);
          write(&dk_head, k_grad);
          write(&dv_head, v_grad);
        }
      });
    };
  };
}

// Attention for inference: PromptFlashAttention, and FusedInferAttentionScore for prompts, without quantised tensors.
#include "attention.h"

namespace {

// Lengths of the images' sequences: none, one for all, or at least one each.
Shape lengths_of(const aclIntArray *given, int64_t batch, int64_t most, const char *name) {
  if (!given || given->values.empty()) return {};
  Shape lengths = given->values;
  require(lengths.size() == 1 || static_cast<int64_t>(lengths.size()) >= batch, "%zu numbers in %s for a batch of %ld",
          lengths.size(), name, batch);
  lengths.resize(batch, lengths[0]);
  for (int64_t length : lengths)
    require(length >= 0 && length <= most, "%s has %ld for sequences of %ld", name, length, most);
  return lengths;
}

Run prompt_attention(AttentionArguments given, const aclIntArray *query_lengths, const aclIntArray *key_lengths,
                     int64_t key_heads, aclTensor *out) {
  given.inference = true;
  std::string layout = given.layout ? given.layout : "", out_layout = layout;
  if (layout == "BNSD_BSND") {
    layout = "BNSD";
    out_layout = "BSND";
  }
  given.layout = layout.c_str();
  Attention a = attention_of(given);
  require(key_heads == a.key_heads || (!key_heads && a.key_heads == a.heads), "numKeyValueHeads is %ld for %ld heads",
          key_heads, a.key_heads);
  a.query_lengths = lengths_of(query_lengths, a.batch, a.queries, "actualSeqLengths");
  a.key_lengths = lengths_of(key_lengths, a.batch, a.keys, "actualSeqLengthsKv");
  require(out, "attentionOut is missing");
  require_same_dtype(given.query, out, "query and attentionOut");
  require_shape(out, "attentionOut", layout_shape(out_layout, a.batch, a.heads, a.queries, a.value_width));
  const aclTensor *query = given.query, *key = given.key, *value = given.value;
  return [=] { attend(a, query, key, value, out, out_layout, nullptr, nullptr); };
}

void require_plain(std::initializer_list<const aclTensor *> tensors) {
  for (const aclTensor *tensor : tensors)
    require(!tensor || !elements(tensor), "the Ascend host has no quantised, paged or padded attention");
}

}  // namespace

KERNEL(aclnnPromptFlashAttentionV3, const aclTensor *query, const aclTensor *key, const aclTensor *value,
       const aclTensor *shift, const aclTensor *mask, const aclIntArray *query_lengths, const aclIntArray *key_lengths,
       const aclTensor *scale1, const aclTensor *quant1, const aclTensor *scale2, const aclTensor *quant2,
       const aclTensor *offset2, int64_t heads, double scale, int64_t before, int64_t after, char *layout,
       int64_t key_heads, int64_t mode, int64_t precise, aclTensor *out) {
  PLAN {
    require_plain({scale1, quant1, scale2, quant2, offset2});
    return prompt_attention({query, key, value, shift, nullptr, nullptr, mask, nullptr, scale, 1.0, before, after, heads,
                             layout, precise, mode}, query_lengths, key_lengths, key_heads, out);
  };
}

KERNEL(aclnnFusedInferAttentionScoreV2, const aclTensor *query, const aclTensorList *keys, const aclTensorList *values,
       const aclTensor *shift, const aclTensor *mask, const aclIntArray *query_lengths, const aclIntArray *key_lengths,
       const aclTensor *scale1, const aclTensor *quant1, const aclTensor *scale2, const aclTensor *quant2,
       const aclTensor *offset2, const aclTensor *antiquant_scale, const aclTensor *antiquant_offset,
       const aclTensor *block_table, const aclTensor *query_padding, const aclTensor *key_padding,
       const aclTensor *key_scale, const aclTensor *key_offset, const aclTensor *value_scale,
       const aclTensor *value_offset, const aclTensor *key_prefix, const aclTensor *value_prefix, const aclIntArray *,
       int64_t heads, double scale, int64_t before, int64_t after, char *layout, int64_t key_heads, int64_t mode,
       int64_t precise, int64_t, int64_t, bool with_sums, int64_t, int64_t, aclTensor *out, aclTensor *) {
  PLAN {
    require_plain({scale1, quant1, scale2, quant2, offset2, antiquant_scale, antiquant_offset, block_table,
                   query_padding, key_padding, key_scale, key_offset, value_scale, value_offset, key_prefix,
                   value_prefix});
    require(keys && values && keys->values.size() == 1 && values->values.size() == 1,
            "the Ascend host takes one tensor of keys and one of values");
    require(!with_sums, "the Ascend host gives no softmaxLse");
    return prompt_attention({query, keys->values[0], values->values[0], shift, nullptr, nullptr, mask, nullptr, scale,
                             1.0, before, after, heads, layout, precise, mode}, query_lengths, key_lengths, key_heads,
                            out);
  };
}

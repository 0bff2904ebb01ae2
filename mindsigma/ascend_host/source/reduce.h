// Reductions of HCCL: items of several ranks combined in the order of the ranks, halves in fp32 and rounded once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

// HcclDataType and HcclReduceOp
enum Kind : int { INT8, INT16, INT32, FP16, FP32, INT64, UINT64, UINT8, UINT16, UINT32, FP64, BFP16, KINDS };
enum Reduction : int { SUM, PRODUCT, MAXIMUM, MINIMUM, REDUCTIONS };

void reduce(const std::vector<const char *> &from, char *to, size_t count, int kind, int reduction);

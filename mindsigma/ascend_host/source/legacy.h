// Operators of the older interface: LEGACY(Name) { computes outputs from inputs }.
#pragma once

#include <map>
#include <string>

#include "arrays.h"
#include "trace.h"

struct Attributes {
  std::map<std::string, int64_t> whole;
  std::map<std::string, float> real;
  std::map<std::string, std::string> words;
  std::map<std::string, Shape> lists;

  int64_t number(const char *name, int64_t otherwise) const {
    auto found = whole.find(name);
    return found == whole.end() ? otherwise : found->second;
  }
};

using LegacyKernel = void (*)(std::vector<aclTensor> &inputs, std::vector<aclTensor> &outputs, const Attributes &);

struct LegacyRegistration {
  LegacyRegistration(const char *name, LegacyKernel kernel);
};

#define LEGACY(NAME)                                                                                          \
  static void NAME##Legacy(std::vector<aclTensor> &inputs, std::vector<aclTensor> &outputs, const Attributes &); \
  static const LegacyRegistration NAME##Registration(#NAME, NAME##Legacy);                                   \
  static void NAME##Legacy([[maybe_unused]] std::vector<aclTensor> &inputs,                                   \
                           [[maybe_unused]] std::vector<aclTensor> &outputs,                                  \
                           [[maybe_unused]] const Attributes &attributes)

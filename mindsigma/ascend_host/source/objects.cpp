// Tensors, scalars, lists and executors of the aclnn interface, and the last error's text.
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "arrays.h"
#include "trace.h"

namespace {

thread_local std::string last_error;

template <class L, class T>
L *list(const T *values, uint64_t count) {
  L *made = new L();
  made->values.assign(values, values + count);
  return made;
}

}  // namespace

std::string text(const char *format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

std::string text(const Shape &shape) {
  std::string result = "(";
  for (size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + (shape.size() == 1 ? ",)" : ")");
}

const char *dtype_name(int dtype) {
  switch (dtype) {
    case F32: return "float32";
    case F16: return "float16";
    case BF16: return "bfloat16";
    case F64: return "double";
    case I8: return "int8";
    case U8: return "uint8";
    case I16: return "int16";
    case U16: return "uint16";
    case I32: return "int32";
    case U32: return "uint32";
    case I64: return "int64";
    case U64: return "uint64";
    case BOOL: return "bool";
    default: return "an unknown dtype";
  }
}

void require(bool condition, const char *format, ...) {
  if (condition) return;
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  throw Refusal{buffer};
}

void require_dtype(const aclTensor *tensor, const char *name, std::initializer_list<int> allowed) {
  require(tensor != nullptr, "%s is missing", name);
  std::string names;
  for (int dtype : allowed) {
    if (tensor->dtype == dtype) return;
    names += (names.empty() ? "" : ", ") + std::string(dtype_name(dtype));
  }
  throw Refusal{text("%s is %s; CANN takes %s", name, dtype_name(tensor->dtype), names.c_str())};
}

void require_same_dtype(const aclTensor *a, const aclTensor *b, const char *names) {
  require(a->dtype == b->dtype, "%s are %s and %s; CANN wants one dtype", names, dtype_name(a->dtype),
          dtype_name(b->dtype));
}

void require_shape(const aclTensor *tensor, const char *name, const Shape &shape) {
  require(tensor->shape == shape, "%s has the shape %s instead of %s", name, text(tensor->shape).c_str(),
          text(shape).c_str());
}

void require_rank(const aclTensor *tensor, const char *name, size_t least, size_t most) {
  size_t rank = tensor->shape.size();
  require(rank >= least && rank <= most, "%s has %zu dimensions; CANN takes %zu to %zu", name, rank, least, most);
}

int fail(int code, const std::string &message) {
  last_error = message;
  return code;
}

int Keeper::operator+(const std::function<Run()> &plan) const {
  std::string name(function);
  name.resize(name.size() - std::strlen("GetWorkspaceSize"));
  *workspace = 0;
  try {
    *executor = new aclOpExecutor{plan(), false};
    return OK;
  } catch (const Refusal &refusal) {
    return fail(PARAMETER_INVALID, name + ": " + refusal.reason);
  } catch (const std::bad_alloc &) {
    return fail(INNER_ERROR, name + ": out of memory");
  }
}

int launch(const char *name, aclOpExecutor *executor) {
  if (!executor) return fail(PARAMETER_INVALID, std::string(name) + ": launched without an executor");
  trace_launch(name);
  int code = OK;
  try {
    executor->run();
  } catch (const Refusal &refusal) {
    code = fail(PARAMETER_INVALID, std::string(name) + ": " + refusal.reason);
  } catch (const std::bad_alloc &) {
    code = fail(INNER_ERROR, std::string(name) + ": out of memory");
  }
  if (!executor->repeatable) delete executor;
  return code;
}

extern "C" {

const char *aclGetRecentErrMsg() {
  static thread_local std::string given;
  given.swap(last_error);
  last_error.clear();
  return given.c_str();
}

size_t aclDataTypeSize(int dtype) { return item_size(dtype); }

aclTensor *aclCreateTensor(const int64_t *dims, uint64_t rank, int dtype, const int64_t *strides, int64_t offset,
                           int format, const int64_t *storage, uint64_t storage_rank, void *data) {
  Shape shape(dims, dims + rank);
  Shape steps = strides ? Shape(strides, strides + rank) : packed_strides(shape);
  return new aclTensor{dtype, format, shape, steps, offset, Shape(storage, storage + storage_rank),
                       static_cast<char *>(data)};
}
int aclDestroyTensor(const aclTensor *tensor) { delete tensor; return OK; }

aclScalar *aclCreateScalar(const void *value, int dtype) {
  aclScalar *scalar = new aclScalar{dtype, {}};
  std::memcpy(scalar->bytes, value, item_size(dtype));
  return scalar;
}
int aclDestroyScalar(const aclScalar *scalar) { delete scalar; return OK; }

aclIntArray *aclCreateIntArray(const int64_t *values, uint64_t count) { return list<aclIntArray>(values, count); }
aclFloatArray *aclCreateFloatArray(const float *values, uint64_t count) { return list<aclFloatArray>(values, count); }
aclBoolArray *aclCreateBoolArray(const bool *values, uint64_t count) { return list<aclBoolArray>(values, count); }
aclTensorList *aclCreateTensorList(aclTensor *const *values, uint64_t count) { return list<aclTensorList>(values, count); }
aclScalarList *aclCreateScalarList(aclScalar *const *values, uint64_t count) { return list<aclScalarList>(values, count); }
int aclDestroyIntArray(const aclIntArray *array) { delete array; return OK; }
int aclDestroyFloatArray(const aclFloatArray *array) { delete array; return OK; }
int aclDestroyBoolArray(const aclBoolArray *array) { delete array; return OK; }

// A list owns its tensors.
int aclDestroyTensorList(const aclTensorList *tensors) {
  for (aclTensor *tensor : tensors->values) delete tensor;
  delete tensors;
  return OK;
}
int aclDestroyScalarList(const aclScalarList *scalars) {
  for (aclScalar *scalar : scalars->values) delete scalar;
  delete scalars;
  return OK;
}

int aclGetViewShape(const aclTensor *tensor, int64_t **dims, uint64_t *rank) {
  *rank = tensor->shape.size();
  *dims = new int64_t[*rank + 1];  // the caller deletes it
  std::copy(tensor->shape.begin(), tensor->shape.end(), *dims);
  return OK;
}

int aclSetAclOpExecutorRepeatable(aclOpExecutor *executor) {
  if (!executor) return fail(PARAMETER_INVALID, "aclSetAclOpExecutorRepeatable: no executor");
  executor->repeatable = true;
  return OK;
}
int aclDestroyAclOpExecutor(aclOpExecutor *executor) { delete executor; return OK; }

// Kernels keep their tensors by address, so a changed address is a changed tensor.
int aclSetTensorAddr(aclOpExecutor *, const size_t, aclTensor *tensor, void *address) {
  tensor->data = static_cast<char *>(address);
  return OK;
}
int aclSetInputTensorAddr(aclOpExecutor *executor, const size_t index, aclTensor *tensor, void *address) {
  return aclSetTensorAddr(executor, index, tensor, address);
}
int aclSetOutputTensorAddr(aclOpExecutor *executor, const size_t index, aclTensor *tensor, void *address) {
  return aclSetTensorAddr(executor, index, tensor, address);
}
int aclSetDynamicTensorAddr(aclOpExecutor *, size_t, const size_t index, aclTensorList *tensors, void *address) {
  if (index >= tensors->values.size()) return fail(PARAMETER_INVALID, "aclSetDynamicTensorAddr: no such tensor");
  tensors->values[index]->data = static_cast<char *>(address);
  return OK;
}

// Memory that kernels of CANN cache for a thread; there is none here.
int InitHugeMemThreadLocal(void *, bool) { return OK; }
void UnInitHugeMemThreadLocal(void *, bool) {}
void ReleaseHugeMem(void *, bool) {}
}

// What nobody wrote. A kernel is refused, which MindSpore makes an exception of; anything else would go on with nonsense.
extern "C" int host_missing_kernel(const char *name) {
  std::string kernel(name);
  kernel.resize(kernel.size() - std::strlen("GetWorkspaceSize"));
  return fail(PARAMETER_INVALID, kernel + ": the Ascend host has no such kernel");
}
extern "C" int host_missing(const char *name) {
  std::fprintf(stderr, "error: the Ascend host has no function %s\n", name);
  std::fflush(stderr);
  _exit(70);
}

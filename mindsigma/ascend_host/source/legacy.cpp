// The older interface: one operator by its name, compiled at its first use on a device, with attributes by name.
#include "legacy.h"

namespace {

struct Buffer { void *address; size_t bytes; };

std::map<std::string, LegacyKernel> &kernels() {
  static std::map<std::string, LegacyKernel> known;
  return known;
}

}  // namespace

struct aclTensorDesc {
  int dtype;
  int format;
  Shape shape;
  std::string name;
};

LegacyRegistration::LegacyRegistration(const char *name, LegacyKernel kernel) { kernels()[name] = kernel; }

extern "C" {

aclTensorDesc *aclCreateTensorDesc(int dtype, int rank, const int64_t *dims, int format) {
  return new aclTensorDesc{dtype, format, Shape(dims, dims + rank), ""};
}
void aclDestroyTensorDesc(const aclTensorDesc *description) { delete description; }
void aclSetTensorDescName(aclTensorDesc *description, const char *name) { description->name = name; }
int aclSetTensorFormat(aclTensorDesc *description, int format) { description->format = format; return OK; }
int aclSetTensorShape(aclTensorDesc *, int, const int64_t *) { return OK; }  // the origin's shape: formats are plain here
int aclSetTensorConst(aclTensorDesc *, void *, size_t) { return OK; }        // the buffer holds the same numbers
int aclSetTensorPlaceMent(aclTensorDesc *, int) { return OK; }               // all memory is the host's
size_t aclGetTensorDescNumDims(const aclTensorDesc *description) { return description->shape.size(); }
int aclGetTensorDescDimV2(const aclTensorDesc *description, size_t index, int64_t *side) {
  *side = description->shape.at(index);
  return OK;
}
size_t aclGetTensorDescSize(const aclTensorDesc *description) {
  return elements(description->shape) * item_size(description->dtype);
}

Buffer *aclCreateDataBuffer(void *address, size_t bytes) { return new Buffer{address, bytes}; }
int aclDestroyDataBuffer(const Buffer *buffer) { delete buffer; return OK; }
int aclUpdateDataBuffer(Buffer *buffer, void *address, size_t bytes) { *buffer = {address, bytes}; return OK; }
void *aclGetDataBufferAddr(const Buffer *buffer) { return buffer->address; }

Attributes *aclopCreateAttr() { return new Attributes(); }
void aclopDestroyAttr(const Attributes *attributes) { delete attributes; }
int aclopSetAttrBool(Attributes *all, const char *name, uint8_t value) { all->whole[name] = value; return OK; }
int aclopSetAttrInt(Attributes *all, const char *name, int64_t value) { all->whole[name] = value; return OK; }
int aclopSetAttrDataType(Attributes *all, const char *name, int value) { all->whole[name] = value; return OK; }
int aclopSetAttrFloat(Attributes *all, const char *name, float value) { all->real[name] = value; return OK; }
int aclopSetAttrString(Attributes *all, const char *name, const char *value) { all->words[name] = value; return OK; }
int aclopSetAttrListInt(Attributes *all, const char *name, int count, const int64_t *values) {
  all->lists[name].assign(values, values + count);
  return OK;
}
int aclopSetCompileFlag(int) { return OK; }
int aclopSetModelDir(const char *) { return OK; }

int aclopCompileAndExecuteV2(const char *name, int inputs, aclTensorDesc *in[], Buffer *in_buffers[], int outputs,
                             aclTensorDesc *out[], Buffer *out_buffers[], const Attributes *attributes, int, int,
                             const char *, void *) {
  auto found = kernels().find(name);
  if (found == kernels().end()) return fail(PARAMETER_INVALID, text("%s: the Ascend host has no such operator", name));
  auto tensors = [](int count, aclTensorDesc *descriptions[], Buffer *buffers[]) {
    std::vector<aclTensor> made;
    for (int i = 0; i < count; ++i) {
      const Shape &shape = descriptions[i]->shape;
      made.push_back({descriptions[i]->dtype, descriptions[i]->format, shape, packed_strides(shape), 0, shape,
                      static_cast<char *>(buffers[i]->address)});
    }
    return made;
  };
  trace_launch((std::string("legacy ") + name).c_str());
  try {
    std::vector<aclTensor> from = tensors(inputs, in, in_buffers), to = tensors(outputs, out, out_buffers);
    found->second(from, to, attributes ? *attributes : Attributes());
    return OK;
  } catch (const Refusal &refusal) {
    return fail(PARAMETER_INVALID, std::string(name) + ": " + refusal.reason);
  }
}
int aclopCompileAndExecute(const char *name, int inputs, aclTensorDesc *in[], Buffer *in_buffers[], int outputs,
                           aclTensorDesc *out[], Buffer *out_buffers[], const Attributes *attributes, int engine,
                           int compile, const char *path, void *stream) {
  return aclopCompileAndExecuteV2(name, inputs, in, in_buffers, outputs, out, out_buffers, attributes, engine, compile,
                                  path, stream);
}
}

"""MindSpore's own Ascend backend on a host without an NPU: a stand-in for CANN that computes on the processor."""

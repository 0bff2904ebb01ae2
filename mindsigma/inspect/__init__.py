"""The graphs that an NPU would run, made visible on a host without one: export, reports, estimates."""

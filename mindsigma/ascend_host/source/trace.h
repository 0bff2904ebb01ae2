// What was launched: MINDSIGMA_HOST_TRACE names a file that gets one line a launch.
#pragma once

#include <string>

void trace_launch(const char *name);

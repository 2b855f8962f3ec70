// All that kernels may include, in one header that is compiled once.
#pragma once

#include "cuda_runtime.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "mma.h"

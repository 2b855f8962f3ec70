// bf16.
#pragma once

#include "latentc_narrow.h"

using __nv_bfloat16 = emulate::Narrow<8>;
using __nv_bfloat162 = emulate::Pair<__nv_bfloat16>;

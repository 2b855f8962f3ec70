// f16.
#pragma once

#include "latentc_narrow.h"

using __half = emulate::Narrow<5>;
using __half2 = emulate::Pair<__half>;

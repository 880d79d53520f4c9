// The library for AVX-512 with BF16 and VNNI: the compiler flags in pyproject.toml make it so.
#include "abi.h"

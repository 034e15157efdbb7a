// Which instruction set runs: the fastest that this machine has, unless another was asked for.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace fastadapt::cpu {

const Table& active();
// Of these the machine can run every one; `amx_emulated` is always last and never chosen by itself.
std::vector<std::string> supported_names();
void set_active(const std::string& name);  // throws for a name that is not among supported_names()

}  // namespace fastadapt::cpu

// images.h - the machine code in this module: which kernel is in which container. cmake/pack.py writes both.
#pragma once
#include <string>

namespace nsa_sel {

struct KernelImage {
  const char* kernel;
  const unsigned char* container;
};
extern const KernelImage kKernelImages[];
extern const int kNumKernelImages;

struct Code {
  const void* image;  // an ELF file, or PTX that ends with a zero; null: none fits
  int capability;     // that it was compiled for, as 90: less than the GPU's where the driver compiles older PTX
};

// The container that holds a kernel; null: none does.
const unsigned char* find_container(const std::string& kernel);
// What a GPU of this compute capability runs: machine code of its major version, the newest not above it, else PTX.
Code find_code(const unsigned char* container, int capability);

}  // namespace nsa_sel

# The kernels, a static library of their own: its objects do not depend on the Python that the module is linked for.
file(GLOB kernel_sources CONFIGURE_DEPENDS cuda/instances/*.cu cuda/*.cu)
if(NOT kernel_sources)
  message(FATAL_ERROR "cuda: expected the kernels' .cu files, got none")
endif()

if(NSA_SEL_ARCHITECTURES STREQUAL "native")
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE capabilities
    RESULT_VARIABLE failed
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
  )
  if(failed OR NOT capabilities MATCHES "^[0-9]+\\.[0-9]+")
    message(FATAL_ERROR "NSA_SEL_ARCHITECTURES=native: expected nvidia-smi to name a GPU, got '${capabilities}' (${failed})")
  endif()
  string(REPLACE "." "" capabilities "${capabilities}")
  string(REPLACE "\n" ";" NSA_SEL_ARCHITECTURES "${capabilities}")
  list(REMOVE_DUPLICATES NSA_SEL_ARCHITECTURES)
  list(SORT NSA_SEL_ARCHITECTURES COMPARE NATURAL)
endif()

list(SORT NSA_SEL_ARCHITECTURES COMPARE NATURAL)

# Machine code for each, and PTX of the last, which the driver compiles on GPUs that are newer than this package.
set(cuda_architectures "")
foreach(architecture IN LISTS NSA_SEL_ARCHITECTURES)
  if(NOT architecture MATCHES "^[0-9]+$" OR architecture VERSION_LESS 80)
    message(FATAL_ERROR "NSA_SEL_ARCHITECTURES: expected 'native' or numbers from 80 as in 80;90, got '${architecture}'")
  endif()
  list(APPEND cuda_architectures "${architecture}-real")
endforeach()
list(GET NSA_SEL_ARCHITECTURES -1 newest)
list(APPEND cuda_architectures "${newest}-virtual")

add_library(nsa_sel_kernels STATIC ${kernel_sources})
target_include_directories(nsa_sel_kernels PRIVATE cpp cuda)
set_target_properties(
  nsa_sel_kernels
  PROPERTIES CUDA_ARCHITECTURES "${cuda_architectures}"
             CUDA_RUNTIME_LIBRARY Static  # imports where there is no driver; device_count() is then 0
)
set(nvcc_options
    --compress-mode=size
    -lineinfo # profilers and compute-sanitizer name source lines; the code stays the same
    --threads=2
    -Xptxas=--warn-on-spills,--warning-as-error # a spill fails the build
)
target_compile_options(nsa_sel_kernels PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${nvcc_options}>")

# The module is linked by the C++ linker, which does not know where this nvcc keeps its libraries.
cmake_path(GET CMAKE_CUDA_COMPILER PARENT_PATH cuda_bin)
find_library(
  nsa_sel_cudart_static cudart_static NO_CACHE REQUIRED
  HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} "${nsa_sel_wheel_root}/lib" "${cuda_bin}/../lib64" "${cuda_bin}/../lib"
)
find_package(Threads REQUIRED)
target_link_libraries(nsa_sel_kernels INTERFACE "${nsa_sel_cudart_static}" Threads::Threads ${CMAKE_DL_LIBS} rt)

# The kernels: each file in cuda/instances/ compiled for each architecture, in parallel, then packed into one C++ file,
# nsa_sel_images. Nothing here depends on the Python that the module is linked for.
file(GLOB kernel_sources cuda/instances/*.cu)
if(NOT kernel_sources)
  message(FATAL_ERROR "cuda/instances: expected the kernels' .cu files, got none")
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
endif()
if(NSA_SEL_ARCHITECTURES STREQUAL "")
  message(FATAL_ERROR "NSA_SEL_ARCHITECTURES: expected 'native' or numbers from 80 as in 80;90, got nothing")
endif()
foreach(architecture IN LISTS NSA_SEL_ARCHITECTURES)
  if(NOT architecture MATCHES "^[0-9]+$" OR architecture LESS 80)
    message(FATAL_ERROR "NSA_SEL_ARCHITECTURES: expected 'native' or numbers from 80 as in 80;90, got '${architecture}'")
  endif()
endforeach()
list(REMOVE_DUPLICATES NSA_SEL_ARCHITECTURES)
list(SORT NSA_SEL_ARCHITECTURES COMPARE NATURAL)
list(GET NSA_SEL_ARCHITECTURES -1 newest)

# Paths relative to the build folder, where ninja runs: the packed table names them, and a folder may be called anything.
file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/kernels")
set(includes "")
foreach(folder IN ITEMS "${CMAKE_CURRENT_SOURCE_DIR}/cpp" "${CMAKE_CURRENT_SOURCE_DIR}/cuda" LISTS nsa_sel_cuda_include)
  list(APPEND includes "-I${folder}")
endforeach()
set(cubins "")
set(ptx "")
foreach(source IN LISTS kernel_sources)
  cmake_path(GET source STEM name)
  foreach(architecture IN LISTS NSA_SEL_ARCHITECTURES)
    set(output "kernels/${name}.${architecture}")
    set(outputs "${output}.cubin")
    set(options "$<$<BOOL:${NSA_SEL_LINE_INFO}>:--line-info>")
    if(architecture STREQUAL newest) # PTX, which the driver compiles on GPUs that are newer than this package
      list(APPEND outputs "${output}.ptx")
      list(APPEND options --ptx "${output}.ptx")
      list(APPEND ptx "${output}.ptx")
    endif()
    add_custom_command(
      OUTPUT ${outputs}
      COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/nvrtc.py" compile --library "${nsa_sel_nvrtc}" --arch
              "${architecture}" --output "${output}.cubin" --depfile "${output}.d" ${options} ${includes} "${source}"
      DEPENDS "${source}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/nvrtc.py"
      DEPFILE "${output}.d"
      COMMENT "Compiling ${name}.cu for sm_${architecture}"
      COMMAND_EXPAND_LISTS VERBATIM
    )
    list(APPEND cubins "${output}.cubin")
  endforeach()
endforeach()

add_custom_command(
  OUTPUT kernels/images.cpp
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/pack.py" --output kernels/images.cpp ${cubins} --ptx ${ptx}
  DEPENDS ${cubins} ${ptx} "${CMAKE_CURRENT_SOURCE_DIR}/cmake/pack.py"
  COMMENT "Packing the kernels"
  VERBATIM
)
add_library(nsa_sel_images OBJECT kernels/images.cpp)
target_include_directories(nsa_sel_images PRIVATE cpp)
target_compile_options(nsa_sel_images PRIVATE -fno-lto) # the section is written in assembly, which LTO does not see

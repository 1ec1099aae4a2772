# Finds a CUDA compiler and enables the language. Sets NSA_SEL_HAS_KERNELS to ON, or to OFF and NSA_SEL_NO_KERNELS_REASON
# to one line that build_info() repeats.
#
# Looked for in this order: $CUDACXX; the package index's wheels beside the building Python (not under
# NSA_SEL_SYSTEM_CUDA=true); the system's (PATH, CUDA_HOME, /usr/local/cuda).
set(nsa_sel_oldest_nvcc 12.8)  # the first with --compress-mode=size

function(nsa_sel_wheel_compiler result)
  set(${result} "" PARENT_SCOPE)
  string(TOLOWER "$ENV{NSA_SEL_SYSTEM_CUDA}" system_cuda)
  if(system_cuda MATCHES "^(true|1|on|yes)$")
    return()
  endif()
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c
      "import importlib.util as u, pathlib as p
spec = u.find_spec('nvidia')
for folder in (spec.submodule_search_locations if spec else ()):
    root = p.Path(folder, 'cu13')
    if (root / 'bin' / 'nvcc').is_file() and (root / 'lib' / 'libcudart_static.a').is_file():
        print(root.resolve().as_posix())
        break"
    OUTPUT_VARIABLE root
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY
  )
  set(${result} "${root}" PARENT_SCOPE)
endfunction()

# Not called by a name of ours: check_language() runs CMake on a project of its own and reads the environment alone.
macro(nsa_sel_find_compiler)
  if("$ENV{CUDACXX}" STREQUAL "")
    nsa_sel_wheel_compiler(nsa_sel_wheel_root)
    if(nsa_sel_wheel_root)
      set(ENV{CUDACXX} "${nsa_sel_wheel_root}/bin/nvcc")
      # The wheels ship lib/, nvcc looks in lib64/.
      set(ENV{NVCC_APPEND_FLAGS} "$ENV{NVCC_APPEND_FLAGS} -L${nsa_sel_wheel_root}/lib")
    elseif(NOT "$ENV{CUDA_HOME}" STREQUAL "" AND EXISTS "$ENV{CUDA_HOME}/bin/nvcc")
      set(ENV{CUDACXX} "$ENV{CUDA_HOME}/bin/nvcc")
    else()
      find_program(nsa_sel_system_nvcc nvcc PATHS /usr/local/cuda/bin NO_CACHE)
      if(nsa_sel_system_nvcc)
        set(ENV{CUDACXX} "${nsa_sel_system_nvcc}")
      endif()
    endif()
  endif()
  # A NOTFOUND kept in the cache of an earlier configure would hide a compiler that was installed since.
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
endmacro()

set(NSA_SEL_HAS_KERNELS OFF)
if(NSA_SEL_WITHOUT_KERNELS)
  set(NSA_SEL_NO_KERNELS_REASON "built with NSA_SEL_WITHOUT_KERNELS=ON")
else()
  nsa_sel_find_compiler()
  if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
    set(NSA_SEL_NO_KERNELS_REASON "no CUDA compiler (nvcc) was found when the package was built")
  elseif(NOT CMAKE_CUDA_COMPILER)
    set(NSA_SEL_NO_KERNELS_REASON "the CUDA compiler $ENV{CUDACXX} does not work with this C++ compiler")
  else()
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS nsa_sel_oldest_nvcc)
      set(NSA_SEL_NO_KERNELS_REASON
          "expected nvcc ${nsa_sel_oldest_nvcc} or newer, got ${CMAKE_CUDA_COMPILER_VERSION} when the package was built"
      )
    else()
      set(NSA_SEL_HAS_KERNELS ON)
    endif()
  endif()
endif()

if(NOT NSA_SEL_HAS_KERNELS)
  if(NSA_SEL_REQUIRE_KERNELS)
    message(FATAL_ERROR "NSA_SEL_REQUIRE_KERNELS: ${NSA_SEL_NO_KERNELS_REASON}")
  endif()
  message(WARNING "nsa_sel is built without CUDA kernels: ${NSA_SEL_NO_KERNELS_REASON}")
endif()

// What the launchers name of the CUDA driver.

#pragma once

enum CUresult { CUDA_SUCCESS };
using CUcontext = void*;
enum CUdevResourceType { CU_DEV_RESOURCE_TYPE_SM };
struct CUdevResource {
  struct {
    unsigned smCount;
  } sm;
};

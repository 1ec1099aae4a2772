"""Typed errors: each derives from ValueError, TypeError or RuntimeError and says argument, expected, got."""

from __future__ import annotations


class NsaSelError(Exception):
    """Base of every error that this package raises on its own account."""


class ArgumentError(NsaSelError, ValueError):
    """An argument has the right type and a wrong shape, stride, device or value."""


class ArgumentTypeError(NsaSelError, TypeError):
    """An argument has a wrong type or a tensor a wrong dtype."""


class AutogradError(NsaSelError, RuntimeError):
    """Gradients are required where none can be given (``out=``)."""


class BackendError(NsaSelError, RuntimeError):
    """A backend that was asked for by name cannot run this call; the message says why."""


class PlanError(BackendError):
    """No launch of the kernel fits this call's sizes or strides; nothing was launched."""


class KernelLaunchError(NsaSelError, RuntimeError):
    """The driver refused one launch and left the CUDA context usable (not sticky), so that a fallback is safe."""


class SwitchError(NsaSelError, ValueError):
    """An environment variable holds a value that it does not know."""


class PolicyError(NsaSelError, ValueError):
    """A policy file is missing where one was named, or does not say what a policy must."""

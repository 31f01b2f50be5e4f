"""Privacy mechanisms, their accounting, and what they allow to be disclosed.

A mechanism is a value here; clients and rounds decide when it is applied.
"""

from fedlora.privacy.central import (
    PRIVACY,
    AnyPrivacy,
    CentralGaussian,
    NoPrivacy,
    Privacy,
)

__all__ = [
    "PRIVACY",
    "AnyPrivacy",
    "CentralGaussian",
    "NoPrivacy",
    "Privacy",
]

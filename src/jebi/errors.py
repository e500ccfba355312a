"""Every error jebi raises for a user's mistake, in one tree.

    JebiError
    ├── ConfigError         a setting is wrong, missing or does nothing      (ValueError)
    ├── DataError           rows, files or columns are wrong                 (ValueError)
    │   └── CheckError      the rows can be read, but training on them would be pointless
    ├── ModelError          the model or its config cannot be used           (ValueError)
    │   └── WeightsError    a weights file lacks, contradicts or breaks      (ValueError)
    ├── AdapterError        an adapter does not fit the model                (ValueError)
    ├── OutOfMemoryError    a model or a training does not fit               (MemoryError)
    ├── DivergedError       the loss became NaN or infinite                  (ArithmeticError)
    └── RankError           another process of the training is gone          (RuntimeError)

A message names the setting and the way out: ``what is wrong`` first, then ``what to do``. Broken invariants
of jebi's own are ``assert``, never one of these.
"""


class JebiError(Exception):
    """Base of all errors that a user can mend; the command line prints its message and exits with 2."""


class ConfigError(JebiError, ValueError):
    """A setting has an impossible value, is missing, or would have no effect."""


class DataError(JebiError, ValueError):
    """A data file, column or row cannot be used."""


class CheckError(DataError):
    """The check before training found what makes it pointless; the message has the codes and how to allow them."""


class ModelError(JebiError, ValueError):
    """A model name, architecture or model config cannot be used."""


class WeightsError(ModelError):
    """A weights file is truncated, lacks a tensor, holds one too many, or has one of another shape."""


class AdapterError(JebiError, ValueError):
    """An adapter does not fit the model it is put on."""


class OutOfMemoryError(JebiError, MemoryError):
    """A model or a training does not fit: told before it is loaded, before its first step, or when memory ran out."""


class DivergedError(JebiError, ArithmeticError):
    """Training was stopped because the loss became NaN or infinite."""


class RankError(JebiError, RuntimeError):
    """A training over several processes was stopped because another of them is gone, or reads other rows."""

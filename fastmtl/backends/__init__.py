"""One module a backend; each offers the ops of :mod:`fastmtl.ops` by the same names. :mod:`fastmtl.backend` chooses."""

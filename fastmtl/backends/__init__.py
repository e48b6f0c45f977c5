"""One module a backend; each offers the ops of :mod:`fastmtl.ops` under the same names. :mod:`fastmtl.backend` chooses."""

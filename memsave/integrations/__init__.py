"""Integrations with other libraries, one module for each, imported only by those who use them.

No other module of memsave imports this package, so that memsave needs none of these libraries.
"""

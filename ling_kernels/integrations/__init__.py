"""ling_kernels inside other libraries, a module for each.

Nothing is imported here: `import ling_kernels.integrations.NAME` imports its library, or says what is missing.
"""

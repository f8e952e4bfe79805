"""The operator as PyTorch sees it: arguments checked, a backend chosen, gradients.

`api` holds the public functions, `call` decides how a call runs, `autograd` is its eager form,
`prepared` what a layer keeps from call to call, and `library` the custom operators that compilers
and exporters see.
"""

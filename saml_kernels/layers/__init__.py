"""`nn.Module`s over the operator: linear, convolution, embedding, routers."""

"""Selection attention inside the engines that people run; one module each, imported only where it is used."""

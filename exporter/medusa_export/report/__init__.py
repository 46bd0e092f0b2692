"""What is in a bundle, and how two bundles differ: `medusa-export inspect` and `medusa-export diff`."""

"""What stands between the network and the endpoints: limits on sizes and times, keys, and host names."""

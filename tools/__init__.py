"""Programs on top: ``bus-run``, ``bus-replay``, settings, benchmarks, the page of flags."""

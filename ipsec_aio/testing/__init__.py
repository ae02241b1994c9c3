"""For tests of programs and of backends that use ipsec_aio. Needs pytest."""

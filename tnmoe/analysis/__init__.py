"""Questions over many sizes or plans."""

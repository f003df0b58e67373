"""Of a run that was spread: that all of it is there, and where."""


def sites_of_whole(run):
    """The sites of a run whose trials are all there and ok, each replicate on one of them."""
    assert {record.status for record in run.records} == {"ok"}
    assert [record.trial for record in run.records] == list(run.manifest.order)
    sites = {}
    for record in run.records:
        sites.setdefault(record.replicate, set()).add(record.site)
    assert all(len(of_one) == 1 for of_one in sites.values())
    return set.union(*sites.values())

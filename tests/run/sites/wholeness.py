"""Checks that a run on several sites is complete."""


def sites_of_whole(run):
    """Assert that all trials of a run are ok and each replicate is on one site, and return the sites."""
    assert {record.status for record in run.records} == {"ok"}
    assert [record.trial for record in run.records] == list(run.manifest.order)
    sites = {}
    for record in run.records:
        sites.setdefault(record.replicate, set()).add(record.site)
    assert all(len(of_one) == 1 for of_one in sites.values())
    return set.union(*sites.values())

"""Running on Ray: clusters, worker groups, jobs, the dashboard. No other folder imports Ray."""

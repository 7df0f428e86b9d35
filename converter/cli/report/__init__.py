"""`--report FILE.html`: what a run did, as one page that needs no network; `FILE.png`: a card. matplotlib draws."""

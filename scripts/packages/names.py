"""Debian's packages of which the corpus is made: those that hold much English and little else.

Dictionaries, books, manual pages, and the manuals of programs and libraries. TRAIN and VALIDATION share no package. A
name that a release of Debian does not have is told, and left out.
"""

NAMES = """
    ada-reference-manual-2012 apache2-doc autoconf-doc bacula-doc bash-doc bind9-doc borgbackup-doc cinder-doc
    clisp-doc cmake-doc crystal-doc csound-doc debian-faq debian-handbook debian-policy debian-reference-en
    developers-reference dict-devil dict-gcide dict-jargon dict-vera dict-wn docbook-xsl-doc-html docutils-doc dpdk-doc
    erlang-doc exim4-doc-html fp-docs-3.2.2 freedombox-doc-en ganeti-doc gap-doc geographiclib-doc ghc-doc git-doc
    glance-doc gnome-devel-docs gnome-user-docs gnuplot-doc grass-doc heat-doc imagemagick-6-doc inkscape-tutorials
    installation-guide-amd64 ironic-doc keystone-doc kicad-doc-en libboost1.81-doc libglib2.0-doc libgtk-4-doc
    libreoffice-help-en-us libstdc++-12-doc libvirt-doc lilypond-doc-html linux-doc-6.1 linuxcnc-doc-en llvm-19-doc
    mailman3-doc manpages manpages-dev maxima-doc mit-scheme-doc netcdf-doc neutron-doc nim-doc nodejs-doc
    nova-doc octave-doc openjdk-17-doc openvswitch-doc petsc3.18-doc pike8.0-doc postfix-doc postgis-doc
    postgresql-doc-15 puredata-doc python-astropy-doc python-django-doc python-flask-doc python-pandas-doc
    python-scipy-doc python-sqlalchemy-doc python-statsmodels-doc python-sympy-doc python3.11-doc qtbase5-doc-html
    r-doc-html racket-doc rust-doc sagemath-doc sbcl-doc selinux-policy-doc singular-doc slurm-wlm-doc sphinx-doc
    swi-prolog-doc swift-doc twisted-doc vim-doc wireshark-doc zsh-doc
"""
TRAIN = tuple(NAMES.split())
VALIDATION = ("dict-foldoc", "gimp-help-en", "krb5-doc", "perl-doc", "python-sklearn-doc", "sqlite3-doc")
